/* gvproxy_tap: a guest's side of gvproxy's L2 switch: a TAP device in this network namespace, carried over a Unix socket.
 *
 *   gvproxy_tap INTERFACE SOCKET         prints "ready" once the switch has taken the connection
 *
 * Protocol (gvproxy's `-listen`): HTTP `POST /connect` on the socket, which the server then takes over; from there on each
 * frame is preceded by its length as a little-endian 16-bit number.
 *
 * As fast as we know how to make it, so that the benchmark shows the switch and not this program: one thread per direction,
 * frames drained from the TAP until it is empty and written at once, large reads from the socket, large socket buffers.
 * (IFF_NAPI was tried and gained nothing.) */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MAX_FRAME = 65535, BUFFER = 1 << 20, ENOUGH = 256 * 1024, SOCKET_BUFFER = 4 << 20 };

static int tap, link_fd;

static void die(const char *what)
{
	fprintf(stderr, "gvproxy_tap: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int open_tap(const char *name)
{
	struct ifreq request = {0};
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		die("/dev/net/tun");
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	request.ifr_flags = IFF_TAP | IFF_NO_PI;
	if (ioctl(fd, TUNSETIFF, &request))
		die("TUNSETIFF");
	return fd;
}

static int dial(const char *path)
{
	static const char hello[] = "POST /connect HTTP/1.1\r\nHost: gvproxy\r\n\r\n";
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int size = SOCKET_BUFFER, fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (strlen(path) >= sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		die(path);
	}
	strcpy(address.sun_path, path);
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
	if (connect(fd, (void *)&address, sizeof address))
		die(path);
	if (write(fd, hello, sizeof hello - 1) != (ssize_t)sizeof hello - 1)
		die("POST /connect");
	return fd;
}

static void write_all(const char *data, size_t size)
{
	while (size > 0) {
		ssize_t n = write(link_fd, data, size);
		if (n <= 0)
			die("switch");
		data += n;
		size -= (size_t)n;
	}
}

static void *tap_to_switch(void *unused)
{
	char *buffer = malloc(BUFFER + 2 + MAX_FRAME);
	struct pollfd event = {tap, POLLIN, 0};
	if (!buffer)
		die("malloc");
	for (;;) {
		size_t used = 0;
		while (used < ENOUGH) {
			ssize_t n = read(tap, buffer + used + 2, MAX_FRAME);
			if (n < 0 && errno == EAGAIN)
				break;
			if (n < 0 && errno == EIO) /* the interface is down for now */
				break;
			if (n < 0)
				die("read from the TAP");
			buffer[used] = (char)(n & 0xff);
			buffer[used + 1] = (char)(n >> 8);
			used += 2 + (size_t)n;
		}
		if (used)
			write_all(buffer, used);
		else
			poll(&event, 1, -1);
	}
	return unused;
}

static void switch_to_tap(void)
{
	char *buffer = malloc(BUFFER);
	size_t used = 0;
	if (!buffer)
		die("malloc");
	for (;;) {
		ssize_t n = read(link_fd, buffer + used, BUFFER - used);
		size_t at = 0;
		if (n <= 0)
			die("switch closed the connection");
		used += (size_t)n;
		while (used - at >= 2) {
			size_t size = (uint8_t)buffer[at] | (size_t)(uint8_t)buffer[at + 1] << 8;
			if (used - at < 2 + size)
				break;
			/* A TAP that refuses a frame (down, or no memory) drops it, as a NIC would. */
			(void)!write(tap, buffer + at + 2, size);
			at += 2 + size;
		}
		memmove(buffer, buffer + at, used - at);
		used -= at;
	}
}

int main(int argc, char **argv)
{
	pthread_t thread;
	if (argc != 3) {
		fputs("gvproxy_tap: INTERFACE SOCKET\n", stderr);
		return 2;
	}
	tap = open_tap(argv[1]);
	link_fd = dial(argv[2]);
	if (pthread_create(&thread, NULL, tap_to_switch, NULL) != 0)
		die("pthread_create");
	puts("ready");
	fflush(stdout);
	switch_to_tap();
	return 0;
}
