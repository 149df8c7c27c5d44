/* Messages on the console. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

static int console = -1;

/*
 * The kernel opened /dev/console as descriptors 0 to 2 if the initramfs had one; where it had none we do, since programs
 * expect them. Messages go to an open file of our own, non-blocking: a console that nobody reads must not stop us.
 */
void console_open(void)
{
	for (int fd = 0; fd < 3; fd++) {
		if (fcntl(fd, F_GETFD) >= 0)
			continue;
		int opened = open("/dev/console", O_RDWR | O_NOCTTY);
		if (opened < 0)
			opened = open("/dev/null", O_RDWR);
		if (opened >= 0 && opened != fd) {
			dup2(opened, fd);
			close(opened);
		}
	}
	console = open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_APPEND | O_CLOEXEC);
}

void console_write(const char *data, size_t size)
{
	int fd = console >= 0 ? console : STDERR_FILENO;

	while (size > 0) {
		ssize_t written = write(fd, data, size);
		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			return; /* what a full console cannot take is lost */
		data += written;
		size -= (size_t)written;
	}
}

void say(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	int prefix = snprintf(line, sizeof(line), "taploom-init: ");

	va_start(arguments, format);
	int length = vsnprintf(line + prefix, sizeof(line) - (size_t)prefix - 1, format, arguments);
	va_end(arguments);
	size_t size = (size_t)prefix + (length < 0 ? 0 : (size_t)length);
	if (size > sizeof(line) - 2)
		size = sizeof(line) - 2;
	line[size++] = '\n';
	console_write(line, size);
}

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

double uptime(void)
{
	return (double)now_ms() / 1000;
}
