/* The machine: loopback, name, limits, power button, and its end. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	int file = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (file < 0 || ioctl(file, SIOCGIFFLAGS, &request)) {
		say("lo: %s", strerror(errno));
	} else {
		request.ifr_flags |= IFF_UP;
		if (ioctl(file, SIOCSIFFLAGS, &request))
			say("lo: %s", strerror(errno));
	}
	if (file >= 0)
		close(file);
}

void set_hostname(const char *name)
{
	if (*name && sethostname(name, strlen(name)))
		say("hostname %s: %s", name, strerror(errno));
}

void raise_limits(void)
{
	struct rlimit limit;

	/* Programs ask for more open files themselves, up to the hard limit, of which the kernel gives PID 1 4096. */
	if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_max >= 1048576)
		return;
	limit.rlim_max = 1048576;
	if (setrlimit(RLIMIT_NOFILE, &limit))
		say("open files: %s", strerror(errno));
}

/* struct input_event and its codes, from linux/input.h: the ABI of 64-bit kernels. */
struct event {
	struct timeval time;
	uint16_t type, code;
	int32_t value;
};
#define TYPE_KEY 1
#define KEY_OF_POWER 116

int open_buttons(int *files, int limit)
{
	DIR *folder = opendir("/dev/input");
	struct dirent *entry;
	int count = 0;

	if (!folder)
		return 0;
	while ((entry = readdir(folder)) && count < limit) {
		char path[300];
		if (strncmp(entry->d_name, "event", 5))
			continue;
		snprintf(path, sizeof(path), "/dev/input/%s", entry->d_name);
		int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (file >= 0)
			files[count++] = file;
	}
	closedir(folder);
	return count;
}

bool power_key(int file)
{
	struct event events[16];
	bool pressed = false;
	ssize_t got;

	while ((got = read(file, events, sizeof(events))) > 0)
		for (size_t i = 0; i < (size_t)got / sizeof(events[0]); i++)
			pressed |= events[i].type == TYPE_KEY && events[i].code == KEY_OF_POWER && events[i].value == 1;
	return pressed;
}

/* Waits until no process is left but us, or for so long. */
static bool all_gone(int wait_ms)
{
	int64_t until = now_ms() + wait_ms;

	for (;;) {
		pid_t pid = waitpid(-1, NULL, WNOHANG);
		if (pid < 0 && errno == ECHILD)
			return true;
		if (pid <= 0) {
			if (now_ms() >= until)
				return false;
			nanosleep(&(struct timespec){0, 5000000}, NULL);
		}
	}
}

/* Unmounts from the last mount to the first; what is busy is made read-only, so that nothing half-written is left. */
static void unmount_all(void)
{
	FILE *table = fopen("/proc/self/mounts", "re");
	char line[1024];
	static char targets[256][256];
	size_t count = 0;
	struct stat space;

	if (!table)
		return;
	/* In a container what we see mounted is also the host's. 0xEFFFFFFC is the first PID namespace (linux/proc_ns.h). */
	if (stat("/proc/self/ns/pid", &space) || space.st_ino != 0xEFFFFFFCU) {
		fclose(table);
		return;
	}
	while (count < LENGTH(targets) && fgets(line, sizeof(line), table)) {
		char type[64];
		if (sscanf(line, "%*s %255s %63s", targets[count], type) != 2 || !strcmp(targets[count], "/proc") ||
		    !strcmp(targets[count], "/"))
			continue;
		count++;
	}
	fclose(table);
	while (count-- > 0)
		if (umount2(targets[count], 0))
			mount(NULL, targets[count], NULL, MS_REMOUNT | MS_RDONLY, NULL);
	mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
}

void stop_processes(int wait_ms)
{
	kill(-1, SIGTERM);
	kill(-1, SIGCONT);
	if (!all_gone(wait_ms)) {
		say("some processes did not end within %d s; they are killed", wait_ms / 1000);
		kill(-1, SIGKILL);
		all_gone(1000);
	}
}

void end_machine(const char *how)
{
	int command = !strcmp(how, "reboot") ? RB_AUTOBOOT : !strcmp(how, "halt") ? RB_HALT_SYSTEM : RB_POWER_OFF;

	sync();
	unmount_all();
	say("%s after %.2f s", how, uptime());
	reboot(command);
	say("%s failed: %s", how, strerror(errno));
	for (;;) /* PID 1 must not end: the kernel would panic */
		pause();
}
