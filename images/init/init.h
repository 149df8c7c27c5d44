/* taploom-init: PID 1 of taploom's images. What its parts offer one another; README.md says what it does. */
#ifndef TAPLOOM_INIT_H
#define TAPLOOM_INIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))
#define MAX_WORDS 64
#define MAX_TEXT 4096

/* console.c: messages, with the name in front; never block, never fail. */
void console_open(void); /* after /proc is mounted */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void console_write(const char *data, size_t size);
double uptime(void); /* seconds since boot */
int64_t now_ms(void); /* milliseconds since boot */

/* params.c: the kernel's command line, our own arguments, and the files below /etc/taploom. */
struct params {
	char control[128], data[128], log[16];
	char hostname[65];
	char exec[MAX_TEXT];
	char root[256], rootflags[256], rootfstype[32];
	char resolv_conf[256], hosts[256];
	char off[16]; /* poweroff, reboot or halt */
	char writable[512]; /* directories of a read-only root to lay a tmpfs over */
};
struct service {
	char name[32];
	char text[MAX_TEXT]; /* words and environment point in here */
	char *argv[MAX_WORDS];
	char *environment[MAX_WORDS];
	bool notify; /* it sends READY=1 to $NOTIFY_SOCKET */
	int oom_score; /* oom_score_adj(5): -1000 to 1000 */

	pid_t pid; /* 0: not running */
	bool ready;
	int64_t started, restart_at; /* ms since boot */
	int64_t backoff;
	int output; /* the pipe with what it prints; -1: none */
};
#define MAX_SERVICES 16
void params_read(struct params *params, int argc, char **argv);
size_t services_read(const struct params *params, struct service *services, size_t limit);

/* mounts.c */
void mount_system(void); /* proc, sys, dev, pts, shm, run, tmp, cgroup2, bpf */
void unmount_system(void); /* those of them that mount_system() mounted */
void mount_writable(const char *directories);
bool mount_root(const struct params *params, const char *target);
bool enter_root(const char *target); /* becomes /, with the system's mounts moved along */

/* machine.c: the rest of what a booted machine needs, and its end. */
void loopback_up(void);
void set_hostname(const char *name);
void raise_limits(void);
int open_buttons(int *files, int limit); /* input devices that may have a power key */
bool power_key(int file); /* reads events; whether the power key was pressed */
void stop_processes(int wait_ms); /* all but us */
void end_machine(const char *how) __attribute__((noreturn));

/* The signals by which systemd is told: SIGRTMIN+3 to +5 by glibc's counting, whatever libc this is built with. */
#define SIGNAL_HALT 37
#define SIGNAL_POWEROFF 38
#define SIGNAL_REBOOT 39

/* services.c: runs until it is told to stop; as PID 1 it then ends the machine, otherwise it returns. */
void supervise(const struct params *params, struct service *services, size_t count);

#endif
