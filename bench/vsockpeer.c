/*
 * vsockpeer: one end of byte streams over a VM's own virtio-vsock device. It runs inside a VM, as its first process or as
 * any other, listens on a vsock port, and does for each connection from the host what the request asks for; what comes
 * out of it is asked for on another connection. Tests put load on the device with it, and the benchmark measures with it
 * what the device can carry at best.
 *
 *   vsockpeer [PORT]        (default 7000)
 *
 * A connection begins with a request, little-endian:
 *
 *   u32 operation, u32 id, u32 size, u32 pause, u64 send, u64 receive
 *
 * operation 1, stream: sends `send` bytes in writes of `size`, and at the same time receives `receive` bytes, pausing
 *   `pause` microseconds before each read. Byte i of a stream is byte i % 4 of the little-endian number i / 4 (a counter),
 *   so that bytes that are lost, doubled or swapped are noticed. Then it waits for the peer to close.
 * operation 2, ping: sends `size` bytes and waits for as many, `send` times, one after the other.
 * operation 3, echo: sends back whatever comes.
 * operation 5, join: copies bytes between this connection and the other one that asks for it with the same id: a relay
 *   in the VM. Whoever comes first waits for the other.
 * operation 4, result: answers with the result of the connection with that id, as soon as it is there:
 *   u64 sent, u64 received, u64 first wrong byte's offset (all ones: none), u64 nanoseconds, u64 error (errno or 0),
 *   u64 median and 99th percentile of the pings in nanoseconds
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { STREAM = 1, PING, ECHO, RESULT, JOIN };
/* WRITE: as much as taploom writes at once. */
enum { RESULTS = 4096, BLOCK = 1 << 20, MOST_PINGS = 100000, WRITE = 28 * 1024 };

struct request {
	uint32_t operation, id, size, pause;
	uint64_t send, receive;
};

struct result {
	uint64_t sent, received, wrong, nanoseconds, error, p50, p99;
};

struct slot {
	volatile int done;
	struct result result;
};

static struct slot *slots; /* shared by all children */

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int read_whole(int fd, void *data, size_t size)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = read(fd, (char *)data + done, size - done);

		if (n <= 0)
			return n ? errno : EPIPE;
		done += n;
	}
	return 0;
}

static int write_whole(int fd, const void *data, size_t size)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = write(fd, (const char *)data + done, size - done);

		if (n < 0)
			return errno;
		done += n;
	}
	return 0;
}

/* The pattern's period is longer than any transfer; a block of it begins at a multiple of 4. */
static void fill(uint8_t *block, size_t size, uint64_t offset)
{
	uint32_t word = offset / 4;

	for (size_t i = 0; i + 4 <= size; i += 4, word++)
		memcpy(block + i, &word, 4);
}

/* Words at a time where they are whole: looking at every byte would cost more than the transfer does. */
static int64_t first_wrong(const uint8_t *data, size_t size, uint64_t offset)
{
	size_t i = 0;

	while (i < size) {
		uint64_t at = offset + i;
		uint32_t word = at / 4;
		uint64_t seen;

		if (at % 4 == 0 && size - i >= sizeof seen) {
			memcpy(&seen, data + i, sizeof seen);
			if (seen == ((uint64_t)(uint32_t)(word + 1) << 32 | word)) {
				i += sizeof seen;
				continue;
			}
		}
		if (data[i] != (uint8_t)(word >> (at % 4 * 8)))
			return i;
		i++;
	}
	return -1;
}

static void stream(int fd, const struct request *request, struct result *result)
{
	size_t write_size = request->size && request->size < BLOCK ? request->size : BLOCK;
	uint8_t *out = malloc(BLOCK + write_size + 4), *in = malloc(BLOCK);
	uint64_t filled_from = 0, filled_to = 0;

	while (result->sent < request->send || result->received < request->receive) {
		struct pollfd p = { .fd = fd };

		if (result->sent < request->send)
			p.events |= POLLOUT;
		if (result->received < request->receive)
			p.events |= POLLIN;
		if (poll(&p, 1, -1) < 0)
			goto failed;
		if (p.revents & (POLLOUT | POLLERR) && result->sent < request->send) {
			size_t size = write_size;
			ssize_t n;

			if (size > request->send - result->sent)
				size = request->send - result->sent;
			if (result->sent + size > filled_to) {
				filled_from = result->sent & ~(uint64_t)3;
				filled_to = filled_from + BLOCK + (write_size & ~(size_t)3);
				fill(out, filled_to - filled_from, filled_from);
			}
			n = send(fd, out + (result->sent - filled_from), size, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n > 0)
				result->sent += n;
			else if (n < 0 && errno != EAGAIN)
				goto failed;
		}
		if (p.revents & (POLLIN | POLLHUP | POLLERR) && result->received < request->receive) {
			ssize_t n;

			if (request->pause)
				usleep(request->pause);
			n = recv(fd, in, BLOCK, MSG_DONTWAIT);
			if (n > 0) {
				int64_t wrong = result->wrong + 1 ? -1 : first_wrong(in, n, result->received);

				if (wrong >= 0)
					result->wrong = result->received + wrong;
				result->received += n;
			} else if (n == 0) {
				errno = EPIPE;
				goto failed;
			} else if (errno != EAGAIN) {
				goto failed;
			}
		}
	}
	return;
failed:
	result->error = errno;
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void ping(int fd, const struct request *request, struct result *result)
{
	uint64_t count = request->send < MOST_PINGS ? request->send : MOST_PINGS;
	uint64_t *took = calloc(count + 1, sizeof *took);
	size_t size = request->size && request->size < BLOCK ? request->size : 1;
	char *data = calloc(1, size);

	for (uint64_t i = 0; i < count; i++) {
		uint64_t began = now();
		int error = write_whole(fd, data, size);

		if (!error)
			error = read_whole(fd, data, size);
		if (error) {
			result->error = error;
			return;
		}
		took[i] = now() - began;
		result->sent += size;
		result->received += size;
	}
	qsort(took, count, sizeof *took, ascending);
	result->p50 = took[count / 2];
	result->p99 = took[count * 99 / 100];
}

static void echo(int fd, struct result *result)
{
	char *data = malloc(BLOCK);
	ssize_t n;

	while ((n = read(fd, data, 16384)) > 0) {
		if (write_whole(fd, data, n))
			break;
		result->sent += n;
		result->received += n;
	}
}

static int copy(int from, int to, char *data)
{
	ssize_t n = recv(from, data, BLOCK, MSG_DONTWAIT);

	if (n <= 0)
		return n < 0 && errno == EAGAIN ? 0 : -1;
	for (ssize_t done = 0; done < n; done += WRITE)
		if (write_whole(to, data + done, n - done < WRITE ? n - done : WRITE))
			return -1;
	return 0;
}

static int send_descriptor(int to, int fd)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof fd)];
	} control = { .header = { CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS } };
	char byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };

	memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
	return sendmsg(to, &message, 0) == 1 ? 0 : -1;
}

static int receive_descriptor(int from)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof from)];
	} control;
	char byte;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	int fd = -1;

	if (recvmsg(from, &message, 0) == 1 && message.msg_controllen >= CMSG_LEN(sizeof fd))
		memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
	return fd;
}

/* Whoever comes second gives its connection to the first one, by a Unix socket; it copies between the two. */
static void join(int fd, uint32_t id)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	socklen_t size = sizeof name.sun_family + 1 + snprintf(name.sun_path + 1, 64, "vsockpeer-%u", id);
	int other = socket(AF_UNIX, SOCK_STREAM, 0);
	struct pollfd p[2] = { { .fd = fd, .events = POLLIN }, { .events = POLLIN } };
	char *data = malloc(BLOCK);

	if (bind(other, (struct sockaddr *)&name, size)) {
		while (connect(other, (struct sockaddr *)&name, size))
			usleep(1000);
		send_descriptor(other, fd);
		return;
	}
	listen(other, 1);
	p[1].fd = receive_descriptor(accept(other, NULL, NULL));
	while (p[1].fd >= 0 && poll(p, 2, -1) > 0)
		if ((p[0].revents && copy(fd, p[1].fd, data)) || (p[1].revents && copy(p[1].fd, fd, data)))
			return;
}

static void serve(int fd)
{
	struct request request;
	struct result result = { .wrong = ~(uint64_t)0 };
	struct slot *slot;
	uint64_t began;
	char byte;

	if (read_whole(fd, &request, sizeof request))
		return;
	slot = &slots[request.id % RESULTS];
	if (request.operation == RESULT) {
		while (!slot->done)
			usleep(2000);
		write_whole(fd, &slot->result, sizeof slot->result);
		shutdown(fd, SHUT_RDWR);
		return;
	}
	slot->done = 0;
	/* The host knows by this byte that the request has been read, and joins the stream with another one then. */
	if (write_whole(fd, "k", 1))
		return;
	began = now();
	switch (request.operation) {
	case STREAM:
		stream(fd, &request, &result);
		break;
	case PING:
		ping(fd, &request, &result);
		break;
	case ECHO:
		echo(fd, &result);
		break;
	case JOIN:
		join(fd, request.id);
		return;
	}
	result.nanoseconds = now() - began;
	slot->result = result;
	__sync_synchronize();
	slot->done = 1;
	while (read(fd, &byte, 1) > 0)
		;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 7000 };
	unsigned long long buffer = 8 << 20;
	int listener;

	if (argc > 1)
		address.svm_port = atoi(argv[1]);
	if (getpid() == 1)
		mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	signal(SIGPIPE, SIG_IGN);
	slots = mmap(NULL, RESULTS * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (slots == MAP_FAILED || listener < 0) {
		perror("vsockpeer");
		return 1;
	}
	setsockopt(listener, AF_VSOCK, SO_VM_SOCKETS_BUFFER_MAX_SIZE, &buffer, sizeof buffer);
	setsockopt(listener, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &buffer, sizeof buffer);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) {
		perror("vsockpeer");
		return 1;
	}
	printf("vsockpeer: listening\n");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (fd < 0)
			continue;
		if (fork() == 0) {
			close(listener);
			serve(fd);
			_exit(0);
		}
		close(fd);
	}
}
