/* What we are told: /etc/taploom/init.conf, then the kernel's command line, then our own arguments; the later wins. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "init.h"

#define CONF "/etc/taploom/init.conf"
#define SERVICES "/etc/taploom/services.d"

static const char *const levels[] = {"debug", "info", "warning", "error"};
static const char *const ends[] = {"poweroff", "reboot", "halt"};

static ssize_t read_file(const char *path, char *into, size_t size)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	size_t filled = 0;

	if (file < 0)
		return -1;
	while (filled < size - 1) {
		ssize_t got = read(file, into + filled, size - 1 - filled);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			break;
		filled += (size_t)got;
	}
	close(file);
	into[filled] = 0;
	return (ssize_t)filled;
}

static bool one_of(const char *value, const char *const *known, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!strcmp(value, known[i]))
			return true;
	return false;
}

/* The forms that taploom/address.py knows for listeners. */
static bool is_address(const char *value)
{
	return !strncmp(value, "vsock:", 6) || !strncmp(value, "unix:/", 6);
}

static bool is_hostname(const char *value)
{
	if (!*value || *value == '-')
		return false;
	for (; *value; value++)
		if (!isalnum((unsigned char)*value) && *value != '-' && *value != '.')
			return false;
	return true;
}

/* Takes one setting. A bad value is named on the console and the former one stays: what can run, runs. */
static void set(struct params *params, const char *key, const char *value, const char *source)
{
	struct {
		const char *key;
		char *place;
		size_t size;
	} const known[] = {
		{"control", params->control, sizeof(params->control)},
		{"data", params->data, sizeof(params->data)},
		{"log", params->log, sizeof(params->log)},
		{"hostname", params->hostname, sizeof(params->hostname)},
		{"exec", params->exec, sizeof(params->exec)},
		{"root", params->root, sizeof(params->root)},
		{"rootflags", params->rootflags, sizeof(params->rootflags)},
		{"rootfstype", params->rootfstype, sizeof(params->rootfstype)},
		{"resolv-conf", params->resolv_conf, sizeof(params->resolv_conf)},
		{"hosts", params->hosts, sizeof(params->hosts)},
		{"off", params->off, sizeof(params->off)},
		{"writable", params->writable, sizeof(params->writable)},
	};
	const char *wanted = NULL;

	for (size_t i = 0; i < LENGTH(known); i++) {
		if (strcmp(key, known[i].key))
			continue;
		if (strlen(value) >= known[i].size)
			wanted = "a shorter value";
		else if ((!strcmp(key, "control") || !strcmp(key, "data")) && !is_address(value))
			wanted = "vsock:any:PORT or unix:/PATH";
		else if (!strcmp(key, "log") && !one_of(value, levels, LENGTH(levels)))
			wanted = "debug, info, warning or error";
		else if (!strcmp(key, "off") && !one_of(value, ends, LENGTH(ends)))
			wanted = "poweroff, reboot or halt";
		else if (!strcmp(key, "hostname") && !is_hostname(value))
			wanted = "letters, digits, - and .";
		else if (!strcmp(key, "exec") && *value != '/')
			wanted = "an absolute path, then arguments after commas";
		else if (!strcmp(key, "root") && *value && strncmp(value, "/dev/", 5) && strncmp(value, "9p:", 3) &&
			 strncmp(value, "virtiofs:", 9))
			wanted = "/dev/NAME, 9p:TAG or virtiofs:TAG";
		else if ((!strcmp(key, "resolv-conf") || !strcmp(key, "hosts")) && *value != '/')
			wanted = "an absolute path";
		if (wanted)
			say("%s: %s=%s is ignored: wanted %s", source, key, value, wanted);
		else
			strcpy(known[i].place, value);
		return;
	}
	if (strcmp(key, "net")) /* the helper's agent reads that one itself */
		say("%s: nothing is called %s; it is ignored", source, key);
}

static char *trim(char *text)
{
	while (isspace((unsigned char)*text))
		text++;
	char *end = text + strlen(text);
	while (end > text && isspace((unsigned char)end[-1]))
		*--end = 0;
	return text;
}

/* Calls `each` for every line "key = value" of a file that is no comment. */
static bool read_conf(const char *path, void (*each)(void *, const char *, const char *, const char *), void *context)
{
	char text[MAX_TEXT * 2];
	char *rest = text, *line;

	if (read_file(path, text, sizeof(text)) < 0)
		return false;
	while ((line = strsep(&rest, "\n"))) {
		line = trim(line);
		if (!*line || *line == '#')
			continue;
		char *value = strchr(line, '=');
		if (!value) {
			say("%s: this line is ignored, it is not KEY = VALUE: %s", path, line);
			continue;
		}
		*value++ = 0;
		each(context, trim(line), trim(value), path);
	}
	return true;
}

/* taploom.KEY=VALUE words, separated by spaces; double quotes protect spaces, as the kernel's own parser has it. */
static void read_words(struct params *params, char *text, const char *source)
{
	for (char *at = text; *at;) {
		while (isspace((unsigned char)*at))
			at++;
		char *word = at, *to = at;
		bool quoted = false;
		for (; *at && (quoted || !isspace((unsigned char)*at)); at++) {
			if (*at == '"')
				quoted = !quoted;
			else
				*to++ = *at;
		}
		if (*at)
			at++;
		*to = 0;
		if (strncmp(word, "taploom.", 8))
			continue;
		char *value = strchr(word, '=');
		if (value)
			*value++ = 0;
		set(params, word + 8, value ? value : "", source);
	}
}

static void image_setting(void *context, const char *key, const char *value, const char *source)
{
	struct params *params = context;

	if (strcmp(key, "command") && strcmp(key, "environment") && strcmp(key, "notify") &&
	    strcmp(key, "oom-score"))
		set(params, key, value, source);
}

void params_read(struct params *params, int argc, char **argv)
{
	char text[MAX_TEXT * 2];

	memset(params, 0, sizeof(*params));
	strcpy(params->log, "info");
	strcpy(params->off, "poweroff");
	if (!read_conf(CONF, image_setting, params))
		say("%s: %s; the image is not complete", CONF, strerror(errno));
	if (read_file("/proc/cmdline", text, sizeof(text)) < 0)
		say("/proc/cmdline: %s; the kernel's parameters are not known", strerror(errno));
	else
		read_words(params, text, "kernel command line");
	for (int i = 1; i < argc; i++) {
		snprintf(text, sizeof(text), "%s", argv[i]);
		read_words(params, text, "arguments");
	}
}

/* Replaces ${key} by what the parameters say. Returns whether it fitted. */
static bool expand(const struct params *params, const char *from, char *to, size_t size)
{
	bool moved = *params->root && *params->exec;
	struct {
		const char *key, *value;
	} const known[] = {
		{"${control}", params->control},
		{"${data}", params->data},
		{"${log}", params->log},
		{"${hostname}", params->hostname},
		{"${resolv-conf}", params->resolv_conf},
		{"${hosts}", params->hosts},
		/* PID 1's root, whatever it mounts later: a service that stays behind writes the files there. */
		{"${root}", moved ? "/proc/1/root" : ""},
	};

	while (*from) {
		const char *piece = from;
		size_t length = 1, skip = 1;
		for (size_t i = 0; i < LENGTH(known); i++) {
			if (!strncmp(from, known[i].key, strlen(known[i].key))) {
				piece = known[i].value;
				length = strlen(piece);
				skip = strlen(known[i].key);
			}
		}
		if (length + 1 > size)
			return false;
		memcpy(to, piece, length);
		to += length;
		size -= length;
		from += skip;
	}
	*to = 0;
	return true;
}

struct reader {
	const struct params *params;
	struct service *service;
	size_t used;
};

static void split(char *text, char **words)
{
	size_t count = 0;

	for (char *word; (word = strsep(&text, " \t")) && count < MAX_WORDS - 1;)
		if (*word)
			words[count++] = word;
	words[count] = NULL;
}

static void service_setting(void *context, const char *key, const char *value, const char *source)
{
	struct reader *reader = context;
	struct service *service = reader->service;
	bool command = !strcmp(key, "command");

	if (command || !strcmp(key, "environment")) {
		char *place = service->text + reader->used;
		size_t left = sizeof(service->text) - reader->used;
		if (left < 2 || !expand(reader->params, value, place, left)) {
			say("%s: %s is too long; it is ignored", source, key);
			return;
		}
		reader->used += strlen(place) + 1;
		split(place, command ? service->argv : service->environment);
	} else if (!strcmp(key, "notify")) {
		service->notify = !strcmp(value, "yes");
	} else if (!strcmp(key, "oom-score")) {
		service->oom_score = atoi(value);
	} else if (strcmp(source, CONF)) {
		say("%s: nothing is called %s; it is ignored", source, key);
	}
}

static void read_service(const struct params *params, struct service *service, const char *path, const char *name)
{
	struct reader reader = {params, service, 0};

	memset(service, 0, sizeof(*service));
	service->output = -1;
	snprintf(service->name, sizeof(service->name), "%s", name);
	read_conf(path, service_setting, &reader);
	if (!service->argv[0])
		say("%s: no command; %s is not started", path, name);
}

static int by_name(const void *one, const void *other)
{
	return strcmp(*(char *const *)one, *(char *const *)other);
}

size_t services_read(const struct params *params, struct service *services, size_t limit)
{
	char *names[MAX_SERVICES * 2];
	size_t found = 0, count = 0;
	struct dirent *entry;

	read_service(params, &services[0], CONF, "agent");
	count += services[0].argv[0] != NULL;
	DIR *folder = opendir(SERVICES);
	if (!folder)
		return count;
	while ((entry = readdir(folder)) && found < LENGTH(names)) {
		size_t length = strlen(entry->d_name);
		if (length > 5 && !strcmp(entry->d_name + length - 5, ".conf"))
			names[found++] = strdup(entry->d_name);
	}
	closedir(folder);
	qsort(names, found, sizeof(names[0]), by_name);
	for (size_t i = 0; i < found; i++) {
		char path[512], name[256];
		snprintf(path, sizeof(path), SERVICES "/%s", names[i]);
		snprintf(name, sizeof(name), "%.*s", (int)(strlen(names[i]) - 5), names[i]);
		free(names[i]);
		if (count == limit) {
			say("%s: more than %zu services; it is not started", path, limit);
			continue;
		}
		read_service(params, &services[count], path, name);
		count += services[count].argv[0] != NULL;
	}
	return count;
}
