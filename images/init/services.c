/* Services: kept running, listened to, and stopped. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "init.h"

#define FIRST_BACKOFF_MS 50
#define LAST_BACKOFF_MS 5000
#define HEALTHY_MS 10000 /* a service that lived this long, or said that it is ready, is started again at once */
#define STOP_MS 5000
#define NOTIFY_FOLDER "/run/taploom-init"
#define NOTIFY_SOCKET NOTIFY_FOLDER "/notify"
#define MAX_BUTTONS 8

extern char **environ;

static bool first; /* whether we are PID 1 */

static void start(struct service *service, int notify)
{
	int pipe_ends[2] = {-1, -1};
	sigset_t none;

	if (service->output < 0 && pipe2(pipe_ends, O_CLOEXEC))
		say("%s: no pipe for what it prints: %s", service->name, strerror(errno));
	service->started = now_ms();
	service->ready = false;
	pid_t pid = fork();
	if (pid < 0) {
		say("%s: %s", service->name, strerror(errno));
		service->restart_at = now_ms() + LAST_BACKOFF_MS;
		for (int i = 0; i < 2; i++)
			if (pipe_ends[i] >= 0)
				close(pipe_ends[i]);
		return;
	}
	if (pid == 0) {
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		setsid();
		int input = open("/dev/null", O_RDONLY);
		if (input >= 0)
			dup2(input, STDIN_FILENO);
		if (pipe_ends[1] >= 0) {
			dup2(pipe_ends[1], STDOUT_FILENO);
			dup2(pipe_ends[1], STDERR_FILENO);
		}
		/* The kernel gives PID 1 odd bits of the command line as its environment: services get a clean one. */
		clearenv();
		setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
		setenv("HOME", "/root", 1);
		setenv("TERM", "linux", 1);
		setenv("LANG", "C.UTF-8", 1);
		if (service->notify && notify >= 0)
			setenv("NOTIFY_SOCKET", NOTIFY_SOCKET, 1);
		for (char **variable = service->environment; *variable; variable++)
			putenv(*variable);
		FILE *score = fopen("/proc/self/oom_score_adj", "we");
		if (score) {
			fprintf(score, "%d", service->oom_score);
			fclose(score);
		}
		execvp(service->argv[0], service->argv);
		dprintf(STDERR_FILENO, "taploom-init: cannot start %s: %s\n", service->argv[0], strerror(errno));
		_exit(127);
	}
	service->pid = pid;
	if (pipe_ends[1] >= 0) {
		close(pipe_ends[1]);
		service->output = pipe_ends[0];
		fcntl(service->output, F_SETFL, O_NONBLOCK);
	}
}

/* Passes on what a service printed. Returns false at its end. */
static bool pass_on(struct service *service)
{
	char data[4096];

	for (;;) {
		ssize_t got = read(service->output, data, sizeof(data));
		if (got > 0)
			console_write(data, (size_t)got);
		else
			return got < 0 && (errno == EAGAIN || errno == EINTR);
	}
}

static void ended(struct service *service, int status)
{
	int64_t lived = now_ms() - service->started;
	char how[64];

	if (service->output >= 0) {
		pass_on(service);
		close(service->output); /* a child of its own may hold it open; the next run gets a new one */
		service->output = -1;
	}
	if (WIFSIGNALED(status))
		snprintf(how, sizeof(how), "was ended by signal %d", WTERMSIG(status));
	else
		snprintf(how, sizeof(how), "ended with status %d", WEXITSTATUS(status));
	if (service->ready || lived >= HEALTHY_MS)
		service->backoff = 0;
	else
		service->backoff = service->backoff ? service->backoff * 2 : FIRST_BACKOFF_MS;
	if (service->backoff > LAST_BACKOFF_MS)
		service->backoff = LAST_BACKOFF_MS;
	service->pid = 0;
	service->restart_at = now_ms() + service->backoff;
	say("%s %s after %.2f s; it is started again in %.2f s", service->name, how, (double)lived / 1000,
	    (double)service->backoff / 1000);
}

static void reap(struct service *services, size_t count)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (size_t i = 0; i < count; i++)
			if (services[i].pid == pid)
				ended(&services[i], status);
}

static int open_notify(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = NOTIFY_SOCKET};
	int on = 1;
	int file = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	mkdir(NOTIFY_FOLDER, 0700);
	unlink(NOTIFY_SOCKET);
	if (file < 0 || bind(file, (struct sockaddr *)&address, sizeof(address)) || chmod(NOTIFY_SOCKET, 0600) ||
	    setsockopt(file, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on))) {
		say("%s: %s; services cannot say that they are ready", NOTIFY_SOCKET, strerror(errno));
		if (file >= 0)
			close(file);
		return -1;
	}
	return file;
}

/* sd_notify(3)'s datagrams: READY=1 among their lines. The kernel says who sent them. */
static void notified(int file, struct service *services, size_t count)
{
	char text[512];
	union {
		char data[CMSG_SPACE(sizeof(struct ucred))];
		struct cmsghdr aligned;
	} control;

	for (;;) {
		struct iovec vector = {text, sizeof(text) - 1};
		struct msghdr message = {
			.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
		ssize_t got = recvmsg(file, &message, MSG_CMSG_CLOEXEC);
		if (got < 0)
			return;
		text[got] = 0;
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		if (!header || header->cmsg_type != SCM_CREDENTIALS || !strstr(text, "READY=1"))
			continue;
		struct ucred sender;
		memcpy(&sender, CMSG_DATA(header), sizeof(sender));
		for (size_t i = 0; i < count; i++) {
			if (services[i].pid != sender.pid || services[i].ready)
				continue;
			services[i].ready = true;
			say("%s answers after %.2f s", services[i].name, uptime());
		}
	}
}

static int pause_ms(const struct service *services, size_t count)
{
	int64_t soonest = -1, now = now_ms();

	for (size_t i = 0; i < count; i++) {
		if (services[i].pid)
			continue;
		int64_t left = services[i].restart_at > now ? services[i].restart_at - now : 0;
		if (soonest < 0 || left < soonest)
			soonest = left;
	}
	return (int)soonest;
}

/* What a signal asks for: "" nothing, otherwise how to end. busybox's and systemd's signals are both understood. */
static const char *asked(int number, const struct params *params)
{
	if (number == SIGTERM || number == SIGINT || number == SIGPWR)
		return params->off;
	if (number == SIGUSR2 || number == SIGNAL_POWEROFF)
		return "poweroff";
	if (number == SIGUSR1 || number == SIGNAL_HALT)
		return "halt";
	return number == SIGNAL_REBOOT ? "reboot" : "";
}

static void pass_all_on(struct service *services, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (services[i].output >= 0)
			pass_on(&services[i]);
}

static void stop(const char *how, struct service *services, size_t count)
{
	if (first) {
		say("%s: stopping", how);
		stop_processes(STOP_MS);
		pass_all_on(services, count);
		end_machine(how);
	}
	say("told to end: the services stop");
	for (size_t i = 0; i < count; i++)
		if (services[i].pid)
			kill(services[i].pid, SIGTERM);
	int64_t until = now_ms() + STOP_MS;
	while (now_ms() < until && waitpid(-1, NULL, WNOHANG) >= 0)
		poll(NULL, 0, 5);
	pass_all_on(services, count);
}

void supervise(const struct params *params, struct service *services, size_t count)
{
	static const int handled[] = {SIGCHLD, SIGTERM, SIGINT, SIGPWR, SIGUSR1,
				      SIGUSR2, SIGHUP,  SIGNAL_HALT, SIGNAL_POWEROFF, SIGNAL_REBOOT};
	struct pollfd polled[2 + MAX_BUTTONS + MAX_SERVICES];
	int buttons[MAX_BUTTONS];
	sigset_t signals;

	first = getpid() == 1;
	sigemptyset(&signals);
	for (size_t i = 0; i < LENGTH(handled); i++)
		sigaddset(&signals, handled[i]);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	int signal_file = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
	int notify = open_notify();
	int button_count = first ? open_buttons(buttons, MAX_BUTTONS) : 0;

	for (;;) {
		size_t used = 0;
		int64_t now = now_ms();
		for (size_t i = 0; i < count; i++)
			if (!services[i].pid && services[i].restart_at <= now)
				start(&services[i], notify);
		polled[used++] = (struct pollfd){.fd = signal_file, .events = POLLIN};
		polled[used++] = (struct pollfd){.fd = notify, .events = POLLIN};
		for (int i = 0; i < button_count; i++)
			polled[used++] = (struct pollfd){.fd = buttons[i], .events = POLLIN};
		for (size_t i = 0; i < count; i++)
			polled[used++] = (struct pollfd){.fd = services[i].output, .events = POLLIN};
		poll(polled, (nfds_t)used, pause_ms(services, count));

		used = 2;
		notified(notify, services, count);
		for (int i = 0; i < button_count; i++, used++) {
			if (polled[used].revents && power_key(buttons[i])) {
				stop("poweroff", services, count);
				return;
			}
		}
		for (size_t i = 0; i < count; i++, used++) {
			if (polled[used].revents && services[i].output >= 0 && !pass_on(&services[i])) {
				close(services[i].output);
				services[i].output = -1;
			}
		}
		struct signalfd_siginfo info;
		while (read(signal_file, &info, sizeof(info)) == sizeof(info)) {
			const char *how = asked((int)info.ssi_signo, params);
			if (*how) {
				stop(how, services, count);
				return;
			}
		}
		reap(services, count);
	}
}
