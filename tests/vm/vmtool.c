/*
 * vmtool: what the tests do inside VMs, well-behaved or not, in one program that needs nothing of the image.
 *
 *   vmtool serve PORT                     TCP echo server on all addresses; prints "ready"
 *   vmtool talk ADDRESS PORT              sends each line of its input there and prints what comes back
 *   vmtool sniff INTERFACE                prints the NAME of each MARK<NAME> in frames that arrive; "ready" first
 *   vmtool send INTERFACE                 sends raw frames: a line of hex digits of its input each
 *   vmtool frames INTERFACE SECONDS       sends small broadcast frames as fast as it can; prints how many
 *   vmtool reach CID PORT...              connects to each over vsock; prints "reach PORT " and: "closed" when the peer closes
 *                                         within 5 s, "open" when not, or the error's name. As PID 1 it stays.
 *   vmtool knock SECONDS PORT...          connects to the host's vsock ports over and over, sending garbage; prints how often
 *                                         it was let in
 *   vmtool garble PID PORT                writes garbage into each vsock connection to PORT that the process PID has
 *   vmtool fake SECONDS PORT...           takes the vsock ports from whoever has them (killing it), floods everyone who
 *                                         connects with garbage and reads nothing; prints "listening"
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/vm_sockets.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_PORTS = 8, MOST_PEERS = 256 };

static int fail(const char *what)
{
	fprintf(stderr, "vmtool: %s: %s\n", what, strerror(errno));
	return 1;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void garbage(uint8_t *data, size_t size)
{
	static uint64_t state = 88172645463325252ull;

	for (size_t i = 0; i < size; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		data[i] = state;
	}
}

static int serve(int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8))
		return fail("listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (fd >= 0 && fork() == 0) {
			char data[4096];
			ssize_t n;

			while ((n = read(fd, data, sizeof data)) > 0)
				if (write(fd, data, n) != n)
					break;
			_exit(0);
		}
		close(fd);
	}
}

static int talk(const char *host, int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	char line[4096];

	inet_pton(AF_INET, host, &address.sin_addr);
	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		return fail("connect");
	while (fgets(line, sizeof line, stdin)) {
		size_t size = strlen(line), got = 0;

		if (write(fd, line, size) != (ssize_t)size)
			return fail("write");
		while (got < size) {
			ssize_t n = read(fd, line + got, size - got);

			if (n <= 0)
				return fail("read");
			got += n;
		}
		fwrite(line, 1, size, stdout);
		fflush(stdout);
	}
	return 0;
}

static int packet_socket(const char *interface)
{
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(ETH_P_ALL),
		.sll_ifindex = if_nametoindex(interface),
	};
	int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
		exit(fail(interface));
	return fd;
}

static void sniff(const char *interface)
{
	int fd = packet_socket(interface);
	char data[70000];

	puts("ready");
	fflush(stdout);
	for (;;) {
		struct sockaddr_ll from;
		socklen_t length = sizeof from;
		ssize_t n = recvfrom(fd, data, sizeof data - 1, 0, (struct sockaddr *)&from, &length);
		char *mark, *end;

		if (n <= 0 || from.sll_pkttype == PACKET_OUTGOING)
			continue;
		data[n] = 0;
		mark = memmem(data, n, "MARK<", 5);
		end = mark ? strchr(mark, '>') : NULL;
		if (end) {
			printf("%.*s\n", (int)(end - mark - 5), mark + 5);
			fflush(stdout);
		}
	}
}

static int send_frames(const char *interface)
{
	int fd = packet_socket(interface);
	char line[8192];
	uint8_t frame[4096];

	while (fgets(line, sizeof line, stdin)) {
		size_t size = 0;
		unsigned byte;

		while (size < sizeof frame && sscanf(line + 2 * size, "%2x", &byte) == 1)
			frame[size++] = byte;
		if (send(fd, frame, size, 0) != (ssize_t)size)
			return fail("send");
	}
	puts("sent");
	return 0;
}

static int frames(const char *interface, double seconds)
{
	int fd = packet_socket(interface);
	uint8_t frame[60] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5 };
	double end = now() + seconds;
	unsigned long sent = 0;

	while (now() < end)
		for (int i = 0; i < 100; i++)
			sent += send(fd, frame, sizeof frame, MSG_DONTWAIT) > 0;
	printf("%lu\n", sent);
	return 0;
}

static int vsock_connect(unsigned cid, unsigned port)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
	struct timeval timeout = { .tv_sec = 10 };
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &timeout, sizeof timeout);
	if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
		int error = errno;

		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

static int reach(unsigned cid, int count, char **ports)
{
	for (int i = 0; i < count; i++) {
		int fd = vsock_connect(cid, atoi(ports[i]));
		struct pollfd p = { .fd = fd, .events = POLLIN };
		const char *what = strerrorname_np(errno);
		char byte;

		if (fd >= 0)
			what = poll(&p, 1, 5000) > 0 && recv(fd, &byte, 1, MSG_DONTWAIT) <= 0 ? "closed" : "open";
		printf("reach %s %s\n", ports[i], what);
		fflush(stdout);
		close(fd);
	}
	while (getpid() == 1)
		pause();
	return 0;
}

static int knock(double seconds, int count, char **ports)
{
	double end = now() + seconds;
	unsigned long in = 0, out = 0;
	uint8_t data[4096];

	garbage(data, sizeof data);
	while (now() < end)
		for (int i = 0; i < count; i++) {
			int fd = vsock_connect(VMADDR_CID_HOST, atoi(ports[i]));

			if (fd >= 0 && send(fd, data, sizeof data, MSG_NOSIGNAL) > 0)
				in++;
			else
				out++;
			if (fd >= 0)
				close(fd);
		}
	printf("let in %lu, turned away %lu\n", in, out);
	return 0;
}

static int garble(int pid, unsigned port)
{
	int pidfd = syscall(SYS_pidfd_open, pid, 0), hit = 0;
	uint8_t data[16384];

	if (pidfd < 0)
		return fail("pidfd_open");
	garbage(data, sizeof data);
	data[0] = 0xff; /* a frame of 4 GiB */
	for (int number = 0; number < 1024; number++) {
		int fd = syscall(SYS_pidfd_getfd, pidfd, number, 0);
		struct sockaddr_vm name, peer;
		socklen_t size = sizeof name, peer_size = sizeof peer;

		if (fd < 0)
			continue;
		if (!getsockname(fd, (struct sockaddr *)&name, &size) && name.svm_family == AF_VSOCK && name.svm_port == port &&
		    !getpeername(fd, (struct sockaddr *)&peer, &peer_size)) {
			/* Behind whatever half of a frame is there: enough that some length is wrong. */
			for (int i = 0; i < 16; i++)
				send(fd, data, sizeof data, MSG_NOSIGNAL | MSG_DONTWAIT);
			hit++;
		}
		close(fd);
	}
	printf("%d\n", hit);
	return !hit;
}

static void kill_holders(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;

	while ((entry = readdir(proc))) {
		char path[300], text[4096];
		int fd, pid = atoi(entry->d_name);
		ssize_t n;

		if (pid <= 1 || pid == getpid())
			continue;
		snprintf(path, sizeof path, "/proc/%s/cmdline", entry->d_name);
		fd = open(path, O_RDONLY);
		n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
		if (fd >= 0)
			close(fd);
		if (n > 0 && memmem(text, n, "/taploom/", 9) && memmem(text, n, "vsock:", 6))
			kill(pid, SIGKILL);
	}
	closedir(proc);
}

static int fake(double seconds, int count, char **ports)
{
	struct pollfd p[MOST_PORTS + MOST_PEERS];
	double end = now() + seconds;
	int used = 0;
	uint8_t data[16384];

	garbage(data, sizeof data);
	for (int i = 0; i < count && i < MOST_PORTS; i++) {
		struct sockaddr_vm address = {
			.svm_family = AF_VSOCK,
			.svm_cid = VMADDR_CID_ANY,
			.svm_port = atoi(ports[i]),
		};
		int fd = socket(AF_VSOCK, SOCK_STREAM, 0);

		while (bind(fd, (struct sockaddr *)&address, sizeof address)) {
			if (errno != EADDRINUSE)
				return fail("bind");
			kill_holders();
		}
		listen(fd, 64);
		p[used++] = (struct pollfd){ .fd = fd, .events = POLLIN };
	}
	puts("listening");
	fflush(stdout);
	while (now() < end) {
		if (poll(p, used, 100) <= 0)
			continue;
		for (int i = 0; i < used; i++) {
			if (i < count && p[i].revents & POLLIN) {
				int fd = accept(p[i].fd, NULL, NULL);

				if (fd >= 0 && used < MOST_PORTS + MOST_PEERS)
					p[used++] = (struct pollfd){ .fd = fd, .events = POLLOUT };
				else if (fd >= 0)
					close(fd);
			} else if (i >= count && p[i].revents) {
				if (send(p[i].fd, data, sizeof data, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN) {
					close(p[i].fd);
					p[i--] = p[--used];
				}
			}
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	signal(SIGPIPE, SIG_IGN);
	if (!strcmp(what, "serve") && argc == 3)
		return serve(atoi(argv[2]));
	if (!strcmp(what, "talk") && argc == 4)
		return talk(argv[2], atoi(argv[3]));
	if (!strcmp(what, "sniff") && argc == 3)
		sniff(argv[2]);
	if (!strcmp(what, "send") && argc == 3)
		return send_frames(argv[2]);
	if (!strcmp(what, "frames") && argc == 4)
		return frames(argv[2], atof(argv[3]));
	if (!strcmp(what, "reach") && argc >= 4)
		return reach(atoi(argv[2]), argc - 3, argv + 3);
	if (!strcmp(what, "knock") && argc >= 4)
		return knock(atof(argv[2]), argc - 3, argv + 3);
	if (!strcmp(what, "garble") && argc == 4)
		return garble(atoi(argv[2]), atoi(argv[3]));
	if (!strcmp(what, "fake") && argc >= 4)
		return fake(atof(argv[2]), argc - 3, argv + 3);
	fprintf(stderr, "vmtool: see vmtool.c\n");
	return 2;
}
