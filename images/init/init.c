/*
 * PID 1 of taploom's images: mounts what every Linux system has, keeps the agent running, reaps, powers off; or hands
 * over to another init and keeps the agent running beside it. README.md lists the parameters.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#include "init.h"

#define NEW_ROOT "/sysroot"

static struct service services[MAX_SERVICES];

/* poweroff, reboot, halt: the same file by another name tells PID 1. */
static int tell(const char *name)
{
	int number = !strcmp(name, "reboot") ? SIGNAL_REBOOT : !strcmp(name, "halt") ? SIGNAL_HALT : SIGNAL_POWEROFF;

	if (kill(1, number)) {
		fprintf(stderr, "%s: cannot tell PID 1: %s\n", name, strerror(errno));
		return 1;
	}
	return 0;
}

static int usage(const char *name)
{
	printf("usage: %s runs as PID 1 of a taploom image; parameters come from the kernel's command line.\n"
	       "As poweroff, reboot or halt (links to it) it tells PID 1 to do that.\n"
	       "example of a command line: taploom.hostname=web taploom.log=debug taploom.exec=/sbin/init taploom.root=/dev/vda\n",
	       name);
	return 2;
}

/*
 * Starts the process that keeps the services running while PID 1 is another program: in a mount namespace of its own,
 * in which the initramfs stays the root. It waits until PID 1 has become the other program (or cannot): only then does
 * /proc/1/root lead to the right files.
 *
 * Returns, once it has its namespace, a descriptor that it waits for: closed by becoming another program, or by the
 * caller. -1: there is no such process.
 */
static int stay_behind(const struct params *params)
{
	int separate[2], replaced[2];
	char byte = 0;

	if (pipe2(separate, O_CLOEXEC) || pipe2(replaced, O_CLOEXEC)) {
		say("no pipe: %s", strerror(errno));
		return -1;
	}
	pid_t pid = fork();
	if (pid < 0) {
		say("no process for the services: %s", strerror(errno));
		return -1;
	}
	if (pid > 0) {
		close(separate[1]);
		close(replaced[0]);
		while (read(separate[0], &byte, 1) < 0 && errno == EINTR)
			;
		close(separate[0]);
		return replaced[1];
	}
	close(separate[0]);
	close(replaced[1]);
	if (unshare(CLONE_NEWNS))
		say("no mount namespace for the services: %s", strerror(errno));
	else if (*params->root)
		umount2(NEW_ROOT, MNT_DETACH); /* ours would keep it busy when it is to be unmounted */
	setsid();
	/* The network of the whole VM hangs on it: it is the last to go when memory is short. */
	FILE *score = fopen("/proc/self/oom_score_adj", "we");
	if (score) {
		fputs("-900", score);
		fclose(score);
	}
	close(separate[1]);
	while (read(replaced[0], &byte, 1) < 0 && errno == EINTR)
		;
	close(replaced[0]);
	supervise(params, services, services_read(params, services, MAX_SERVICES));
	exit(0);
}

/* Becomes taploom.exec. Returns only when that failed, and has said why: whether another process runs the services. */
static bool hand_over(struct params *params)
{
	static char *argv[MAX_WORDS];
	static char path[MAX_TEXT + 16];
	char *rest = params->exec;
	size_t words = 0;
	bool moves = *params->root != 0;
	struct stat found;

	for (char *word; (word = strsep(&rest, ",")) && words < MAX_WORDS - 1;)
		argv[words++] = word;
	mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL); /* what is shared can be neither moved nor kept apart */
	if (moves && !mount_root(params, NEW_ROOT)) {
		say("%s does not take over", argv[0]);
		*params->root = 0;
		return false;
	}
	/* Symbolic links of another root cannot be followed from here; what is no link can be checked. */
	snprintf(path, sizeof(path), "%s%s", moves ? NEW_ROOT : "", argv[0]);
	int error = lstat(path, &found) ? errno : 0;
	if (!error && !S_ISLNK(found.st_mode) && (!S_ISREG(found.st_mode) || access(path, X_OK)))
		error = EACCES;
	if (error) {
		say("%s does not take over: %s", argv[0], strerror(error));
		if (moves)
			umount2(NEW_ROOT, MNT_DETACH);
		*params->root = 0;
		return false;
	}
	int waiting = stay_behind(params);
	say("%s takes over after %.3f s", argv[0], uptime());
	if (!moves)
		unmount_system(); /* the other init finds the machine as the kernel left it, and mounts for itself */
	if (!moves || enter_root(NEW_ROOT)) {
		execv(argv[0], argv);
		say("cannot become %s: %s", argv[0], strerror(errno));
	}
	if (!moves)
		mount_system();
	if (waiting >= 0)
		close(waiting);
	return waiting >= 0;
}

int main(int argc, char **argv)
{
	static struct params params;
	const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];

	if (getpid() != 1) {
		if (!strcmp(name, "poweroff") || !strcmp(name, "reboot") || !strcmp(name, "halt") ||
		    !strcmp(name, "shutdown"))
			return tell(name);
		return usage(name);
	}
	say("init after %.3f s", uptime());
	umask(022);
	reboot(RB_DISABLE_CAD); /* ctrl-alt-del sends us SIGINT */
	mount_system();
	console_open();
	params_read(&params, argc, argv);
	mount_writable(params.writable);
	set_hostname(params.hostname);
	loopback_up();
	raise_limits();
	bool elsewhere = *params.exec && hand_over(&params);
	size_t count = elsewhere ? 0 : services_read(&params, services, MAX_SERVICES);
	supervise(&params, services, count);
	return 0;
}
