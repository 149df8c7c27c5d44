/* File systems: those that every Linux system has, and the root of another system. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

#define ROOT_WAIT_MS 10000
#define POLL_NS 20000000 /* between looks for a device that has not appeared yet */

static const struct {
	const char *type, *target, *options;
	unsigned long flags;
	bool optional; /* a kernel may be without it */
	bool moves; /* along into another root */
} system_mounts[] = {
	{"proc", "/proc", "", MS_NOSUID | MS_NODEV | MS_NOEXEC, false, true},
	{"sysfs", "/sys", "", MS_NOSUID | MS_NODEV | MS_NOEXEC, false, true},
	{"devtmpfs", "/dev", "mode=755", MS_NOSUID, false, true},
	{"devpts", "/dev/pts", "mode=620,ptmxmode=666,gid=5", MS_NOSUID | MS_NOEXEC, true, false},
	{"tmpfs", "/dev/shm", "mode=1777", MS_NOSUID | MS_NODEV, false, false},
	{"mqueue", "/dev/mqueue", "", MS_NOSUID | MS_NODEV | MS_NOEXEC, true, false},
	{"tmpfs", "/run", "mode=755", MS_NOSUID | MS_NODEV, false, true},
	{"tmpfs", "/tmp", "mode=1777", MS_NOSUID | MS_NODEV, false, false},
	{"cgroup2", "/sys/fs/cgroup", "nsdelegate", MS_NOSUID | MS_NODEV | MS_NOEXEC, true, false},
	{"bpf", "/sys/fs/bpf", "mode=700", MS_NOSUID | MS_NODEV | MS_NOEXEC, true, false},
};
static bool mounted[LENGTH(system_mounts)];

static void make_directory(const char *path)
{
	if (mkdir(path, 0755) && errno != EEXIST && errno != EROFS)
		say("%s: %s", path, strerror(errno));
}

void mount_system(void)
{
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"},
		{"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"},
		{"/proc/self/fd/2", "/dev/stderr"},
	};

	for (size_t i = 0; i < LENGTH(system_mounts); i++) {
		const char *target = system_mounts[i].target;
		if (strncmp(target, "/sys/", 5))
			make_directory(target);
		/* The kernel may have mounted /dev (CONFIG_DEVTMPFS_MOUNT), a runtime all of them: EBUSY. */
		if (!mount(system_mounts[i].type, target, system_mounts[i].type, system_mounts[i].flags,
			   system_mounts[i].options))
			mounted[i] = true;
		else if (errno != EBUSY && !(system_mounts[i].optional && (errno == ENODEV || errno == ENOENT)))
			say("cannot mount %s on %s: %s", system_mounts[i].type, target, strerror(errno));
	}
	for (size_t i = 0; i < LENGTH(links); i++)
		if (symlink(links[i][0], links[i][1]) && errno != EEXIST)
			say("%s: %s", links[i][1], strerror(errno));
}

void unmount_system(void)
{
	for (size_t i = LENGTH(system_mounts); i-- > 0;) {
		if (mounted[i])
			umount2(system_mounts[i].target, MNT_DETACH);
		mounted[i] = false;
	}
}

/* Makes directories of a read-only root writable: an overlay with what they hold below a tmpfs. */
void mount_writable(const char *directories)
{
	char text[512], *rest = text, *directory;
	struct statvfs root;
	int number = 0;

	if (!*directories || statvfs("/", &root) || !(root.f_flag & ST_RDONLY))
		return;
	snprintf(text, sizeof(text), "%s", directories);
	make_directory("/run/taploom-init");
	make_directory("/run/taploom-init/writable");
	if (mount("tmpfs", "/run/taploom-init/writable", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")) {
		say("cannot mount a tmpfs for %s: %s", directories, strerror(errno));
		return;
	}
	while ((directory = strsep(&rest, " \t"))) {
		char upper[128], work[128], options[900];
		if (!*directory)
			continue;
		snprintf(upper, sizeof(upper), "/run/taploom-init/writable/%d", number);
		snprintf(work, sizeof(work), "/run/taploom-init/writable/%d.work", number++);
		make_directory(upper);
		make_directory(work);
		snprintf(options, sizeof(options), "lowerdir=%s,upperdir=%s,workdir=%s", directory, upper, work);
		if (mount("overlay", directory, "overlay", 0, options))
			say("cannot make %s writable: %s", directory, strerror(errno));
	}
}

/* Takes ro, nosuid and their like out of mount options; what is left goes to the file system. */
static unsigned long mount_flags(const char *flags, char *data, size_t size)
{
	static const struct {
		const char *name;
		unsigned long flag;
	} known[] = {
		{"ro", MS_RDONLY},	   {"rw", 0},		   {"nosuid", MS_NOSUID},   {"nodev", MS_NODEV},
		{"noexec", MS_NOEXEC},	   {"noatime", MS_NOATIME}, {"relatime", MS_RELATIME}, {"sync", MS_SYNCHRONOUS},
		{"dirsync", MS_DIRSYNC},
	};
	char text[256], *rest = text, *word;
	unsigned long found = 0;
	size_t used = strlen(data);

	snprintf(text, sizeof(text), "%s", flags);
	while ((word = strsep(&rest, ","))) {
		bool flag = !*word;
		for (size_t i = 0; i < LENGTH(known); i++) {
			if (!strcmp(word, known[i].name)) {
				found |= known[i].flag;
				flag = true;
			}
		}
		if (!flag)
			used += (size_t)snprintf(data + used, size - used, "%s%s", used ? "," : "", word);
	}
	return found;
}

/* Tries one type, read-only where it cannot be written. Returns 0 or the error. */
static int try_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	if (!mount(source, target, type, flags, data))
		return 0;
	if ((errno == EROFS || errno == EACCES) && !(flags & MS_RDONLY) &&
	    !mount(source, target, type, flags | MS_RDONLY, data))
		return 0;
	return errno;
}

/* Tries every block file system that the kernel has. Returns 0 or the last error that was not "another type". */
static int try_all(const char *source, const char *target, unsigned long flags, const char *data)
{
	FILE *types = fopen("/proc/filesystems", "re");
	char line[128];
	int result = EINVAL;

	if (!types)
		return errno;
	while (fgets(line, sizeof(line), types)) {
		if (line[0] != '\t') /* nodev */
			continue;
		line[strcspn(line, "\n")] = 0;
		int error = try_mount(source, target, line + 1, flags, data);
		if (error != EINVAL)
			result = error;
		if (!error)
			break;
	}
	fclose(types);
	return result;
}

bool mount_root(const struct params *params, const char *target)
{
	const char *source = params->root, *type = params->rootfstype;
	bool plan9 = !strncmp(source, "9p:", 3), virtiofs = !strncmp(source, "virtiofs:", 9);
	char data[400] = "";
	int64_t began = now_ms();
	bool told = false;

	if (plan9)
		strcpy(data, "trans=virtio,version=9p2000.L,msize=512000");
	unsigned long flags = mount_flags(params->rootflags, data, sizeof(data));
	if (plan9 || virtiofs) {
		source = strchr(source, ':') + 1;
		type = plan9 ? "9p" : "virtiofs";
	}
	make_directory(target);
	for (;;) {
		int error = *type ? try_mount(source, target, type, flags, data) : try_all(source, target, flags, data);
		if (!error)
			return true;
		/* A device or tag that is not there yet. virtiofs says EINVAL for an unknown tag. */
		bool absent = error == ENOENT || error == ENXIO || (virtiofs && error == EINVAL);
		if (!absent || now_ms() - began > ROOT_WAIT_MS) {
			say("cannot mount %s as the root: %s", params->root, strerror(error));
			return false;
		}
		if (!told)
			say("waiting for %s", params->root);
		told = true;
		nanosleep(&(struct timespec){0, POLL_NS}, NULL);
	}
}

bool enter_root(const char *target)
{
	char place[512];

	for (size_t i = 0; i < LENGTH(system_mounts); i++) {
		if (!system_mounts[i].moves)
			continue;
		snprintf(place, sizeof(place), "%s%s", target, system_mounts[i].target);
		if (mount(system_mounts[i].target, place, NULL, MS_MOVE, NULL))
			say("%s does not come along into the new root: %s", system_mounts[i].target, strerror(errno));
	}
	/* The initramfs itself cannot be unmounted (pivot_root(2)): the new root is laid over it. */
	if (chdir(target) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/")) {
		say("cannot enter the new root: %s", strerror(errno));
		return false;
	}
	return true;
}
