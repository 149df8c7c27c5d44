/* netprobe: the one measuring tool that the benchmark runs on every path, so that no path is measured with another yardstick.
 *
 *   netprobe serve PORT                                  UDP echo, UDP sink and TCP sink until killed; prints "ready"
 *   netprobe rtt HOST PORT COUNT INTERVAL_US             UDP request and response, one at a time
 *   netprobe flood HOST PORT PAYLOAD RATE MILLISECONDS   UDP packets at RATE per second (0: as fast as it goes)
 *   netprobe bulk HOST PORT BYTES                        TCP transfer with the whole machine's CPU time beside it
 *   netprobe rate HOST PORT CLIENTS MILLISECONDS         TCP connections, each with a request and its answer, by CLIENTS at once
 *   netprobe first HOST PORT TIMEOUT_MS INTERVAL_US      prints "ready", then waits for the first reply of a peer that
 *                                                        cannot be reached yet
 *
 * HOST is an IPv4 address. Each client prints one JSON object. Times are CLOCK_MONOTONIC in nanoseconds. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, MAX_PAYLOAD = 1472, BULK_BUFFER = 256 * 1024, TICK_NS = 100 * 1000 };

/* First byte of a datagram. */
enum { OP_ECHO = 'E', OP_DATA = 'D', OP_RESET = 'R', OP_QUERY = 'Q' };

struct counts { /* the answer to OP_QUERY; both ends run on one machine, so host byte order will do */
	char op;
	uint64_t nonce;
	uint64_t packets;
	uint64_t first_ns;
	uint64_t last_ns;
} __attribute__((packed));

static void die(const char *what)
{
	fprintf(stderr, "netprobe: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void sleep_until(uint64_t when)
{
	struct timespec t = {.tv_sec = (time_t)(when / 1000000000u), .tv_nsec = (long)(when % 1000000000u)};
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
		;
}

static struct sockaddr_in parse(const char *host, const char *port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
		errno = EINVAL;
		die(host);
	}
	return address;
}

static int udp_socket(void)
{
	int size = 8 << 20, fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0)
		die("socket");
	/* So that what is counted as lost was lost on the path. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) != 0)
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
	return fd;
}

/* ---- serve ---- */

static void *tcp_connection(void *argument)
{
	int fd = (int)(intptr_t)argument;
	char *buffer = malloc(BULK_BUFFER);
	ssize_t n = 0;
	while (buffer && (n = read(fd, buffer, BULK_BUFFER)) > 0)
		;
	if (n == 0 && write(fd, "k", 1) != 1) /* everything arrived */
		perror("netprobe: acknowledge");
	free(buffer);
	close(fd);
	return NULL;
}

static void *tcp_accept(void *argument)
{
	int listener = (int)(intptr_t)argument;
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		pthread_t thread;
		if (fd < 0)
			continue;
		if (pthread_create(&thread, NULL, tcp_connection, (void *)(intptr_t)fd) != 0)
			close(fd);
		else
			pthread_detach(thread);
	}
	return NULL;
}

static void serve(const char *port)
{
	static char payload[BATCH][MAX_PAYLOAD];
	struct sockaddr_in address = parse("0.0.0.0", port), peers[BATCH];
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];
	struct counts counts = {.op = OP_QUERY};
	int udp = udp_socket(), tcp = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	pthread_t thread;

	setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(udp, (void *)&address, sizeof address) || bind(tcp, (void *)&address, sizeof address) || listen(tcp, 16))
		die("bind");
	if (pthread_create(&thread, NULL, tcp_accept, (void *)(intptr_t)tcp) != 0)
		die("pthread_create");
	puts("ready");
	fflush(stdout);
	memset(messages, 0, sizeof messages);
	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){payload[i], MAX_PAYLOAD};
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
		messages[i].msg_hdr.msg_name = &peers[i];
	}
	for (;;) {
		for (int i = 0; i < BATCH; i++)
			messages[i].msg_hdr.msg_namelen = sizeof peers[i];
		int got = recvmmsg(udp, messages, BATCH, MSG_WAITFORONE, NULL);
		uint64_t now = now_ns();
		for (int i = 0; i < got; i++) {
			char op = payload[i][0];
			if (op == OP_DATA) {
				if (counts.packets++ == 0)
					counts.first_ns = now;
				counts.last_ns = now;
				continue;
			}
			if (op == OP_RESET)
				counts = (struct counts){.op = OP_QUERY};
			if (op == OP_QUERY && messages[i].msg_len >= 1 + sizeof(uint64_t)) {
				memcpy(&counts.nonce, payload[i] + 1, sizeof counts.nonce);
				sendto(udp, &counts, sizeof counts, 0, (void *)&peers[i], sizeof peers[i]);
			} else {
				sendto(udp, payload[i], messages[i].msg_len, 0, (void *)&peers[i], sizeof peers[i]);
			}
		}
	}
}

/* ---- clients ---- */

struct request {
	char op;
	uint64_t nonce;
} __attribute__((packed));

/* Sends op and waits for its answer; false after the time-out (milliseconds). */
static int ask(int fd, char op, uint64_t nonce, void *answer, size_t size, int timeout)
{
	struct request request = {op, nonce}, head;
	uint64_t deadline = now_ns() + (uint64_t)timeout * 1000000u;
	/* Refused or unreachable for now: the next try tells. */
	if (send(fd, &request, sizeof request, 0) < 0 && errno != ECONNREFUSED && errno != ENOBUFS)
		return 0;
	for (;;) {
		uint64_t now = now_ns();
		struct pollfd event = {fd, POLLIN, 0};
		struct timespec left = {0, 0};
		if (now >= deadline)
			return 0;
		left.tv_sec = (time_t)((deadline - now) / 1000000000u);
		left.tv_nsec = (long)((deadline - now) % 1000000000u);
		if (ppoll(&event, 1, &left, NULL) < 1)
			continue;
		ssize_t got = recv(fd, answer, size, 0);
		if (got < (ssize_t)sizeof head)
			continue;
		memcpy(&head, answer, sizeof head);
		if (head.op == op && head.nonce == nonce)
			return 1;
	}
}

static int connected(const char *host, const char *port)
{
	struct sockaddr_in address = parse(host, port);
	int fd = udp_socket();
	if (connect(fd, (void *)&address, sizeof address))
		die("connect");
	return fd;
}

static void rtt(const char *host, const char *port, long count, long interval_us)
{
	int fd = connected(host, port);
	uint64_t base = now_ns(), next = base, answer[8];
	uint64_t *samples = calloc((size_t)count + 1, sizeof *samples);
	long received = 0;
	if (!samples)
		die("calloc");
	for (long i = 0; i < count; i++) {
		uint64_t start = now_ns();
		if (ask(fd, OP_ECHO, base + (uint64_t)i, answer, sizeof answer, 1000))
			samples[received++] = now_ns() - start;
		next += (uint64_t)interval_us * 1000u;
		if (next < now_ns())
			next = now_ns();
		sleep_until(next);
	}
	printf("{\"sent\": %ld, \"rtt_ns\": [", count);
	for (long i = 0; i < received; i++)
		printf("%s%" PRIu64, i ? ", " : "", samples[i]);
	puts("]}");
}

static void ask_until(int fd, char op, void *answer, size_t size)
{
	for (int i = 0; i < 50; i++)
		if (ask(fd, op, now_ns(), answer, size, 200))
			return;
	errno = ETIMEDOUT;
	die("no answer from the other side");
}

static void flood(const char *host, const char *port, size_t payload, uint64_t rate, uint64_t milliseconds)
{
	static char data[MAX_PAYLOAD] = {OP_DATA};
	struct mmsghdr messages[BATCH];
	struct iovec vector = {data, payload};
	struct counts counts;
	char answer[64];
	uint64_t sent = 0, start, end, now;
	int fd = connected(host, port);

	if (payload < 1 || payload > MAX_PAYLOAD) {
		errno = EINVAL;
		die("payload");
	}
	memset(messages, 0, sizeof messages);
	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &vector;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	ask_until(fd, OP_RESET, answer, sizeof answer);
	start = now_ns();
	end = start + milliseconds * 1000000u;
	while ((now = now_ns()) < end) {
		uint64_t due = BATCH;
		if (rate) {
			uint64_t target = (uint64_t)((double)(now - start) * (double)rate / 1e9) + 1;
			due = target > sent ? target - sent : 0;
		}
		while (due > 0 && now_ns() < end) {
			int n = sendmmsg(fd, messages, due < BATCH ? (unsigned)due : BATCH, 0);
			if (n < 0 && errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
				die("sendmmsg");
			if (n <= 0)
				continue;
			sent += (uint64_t)n;
			due -= (uint64_t)n;
		}
		if (rate)
			sleep_until(now + TICK_NS);
	}
	now = now_ns();
	/* The path keeps the order, so the answer comes after the last packet that will ever arrive. */
	ask_until(fd, OP_QUERY, &counts, sizeof counts);
	printf("{\"sent\": %" PRIu64 ", \"received\": %" PRIu64 ", \"send_ns\": %" PRIu64 ", \"receive_ns\": %" PRIu64 "}\n",
	       sent, counts.packets, now - start, counts.last_ns - counts.first_ns);
}

/* Nanoseconds that all CPUs together have been busy (user, nice, system, irq, softirq) and stolen; proc_stat(5). */
static void cpu_times(uint64_t *busy, uint64_t *stolen)
{
	unsigned long long t[8] = {0};
	uint64_t tick = 1000000000u / (uint64_t)sysconf(_SC_CLK_TCK);
	FILE *file = fopen("/proc/stat", "r");
	if (!file || fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &t[0], &t[1], &t[2], &t[3], &t[4], &t[5],
			    &t[6], &t[7]) != 8)
		die("/proc/stat");
	fclose(file);
	*busy = (t[0] + t[1] + t[2] + t[5] + t[6]) * tick;
	*stolen = t[7] * tick;
}

static void bulk(const char *host, const char *port, uint64_t bytes)
{
	struct sockaddr_in address = parse(host, port);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	char *buffer = calloc(1, BULK_BUFFER), done;
	uint64_t busy[2], stolen[2], start, left = bytes;

	if (!buffer || connect(fd, (void *)&address, sizeof address))
		die("connect");
	cpu_times(&busy[0], &stolen[0]);
	start = now_ns();
	while (left > 0) {
		ssize_t n = write(fd, buffer, left < BULK_BUFFER ? left : BULK_BUFFER);
		if (n < 0)
			die("write");
		left -= (uint64_t)n;
	}
	shutdown(fd, SHUT_WR);
	if (read(fd, &done, 1) != 1)
		die("the other side did not acknowledge");
	uint64_t elapsed = now_ns() - start;
	cpu_times(&busy[1], &stolen[1]);
	printf("{\"bytes\": %" PRIu64 ", \"elapsed_ns\": %" PRIu64 ", \"busy_ns\": %" PRIu64 ", \"stolen_ns\": %" PRIu64 "}\n",
	       bytes, elapsed, busy[1] - busy[0], stolen[1] - stolen[0]);
}

/* ---- rate ---- */

struct caller {
	pthread_t thread;
	struct sockaddr_in address;
	uint64_t deadline, done, failed;
};

static void *call(void *argument)
{
	struct caller *caller = argument;
	char request[64] = "request", answer;
	while (now_ns() < caller->deadline) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		if (fd < 0)
			die("socket");
		if (connect(fd, (void *)&caller->address, sizeof caller->address) == 0 &&
		    write(fd, request, sizeof request) == (ssize_t)sizeof request && shutdown(fd, SHUT_WR) == 0 &&
		    read(fd, &answer, 1) == 1)
			caller->done++;
		else
			caller->failed++;
		close(fd);
	}
	return NULL;
}

static void rate(const char *host, const char *port, size_t clients, uint64_t milliseconds)
{
	struct caller *callers = calloc(clients, sizeof *callers);
	uint64_t start = now_ns(), done = 0, failed = 0;
	if (!callers)
		die("calloc");
	for (size_t i = 0; i < clients; i++) {
		callers[i].address = parse(host, port);
		callers[i].deadline = start + milliseconds * 1000000u;
		if ((errno = pthread_create(&callers[i].thread, NULL, call, &callers[i])) != 0)
			die("pthread_create");
	}
	for (size_t i = 0; i < clients; i++) {
		pthread_join(callers[i].thread, NULL);
		done += callers[i].done;
		failed += callers[i].failed;
	}
	printf("{\"connections\": %" PRIu64 ", \"failed\": %" PRIu64 ", \"elapsed_ns\": %" PRIu64 "}\n", done, failed,
	       now_ns() - start);
}

static void first(const char *host, const char *port, long timeout_ms, long interval_us)
{
	/* Not connected: every packet asks the routing table again, which changes while this runs. */
	struct sockaddr_in address = parse(host, port);
	int fd = udp_socket(), on = 1;
	uint64_t start = now_ns(), deadline = start + (uint64_t)timeout_ms * 1000000u;
	struct request request = {OP_ECHO, start}, answer;

	/* Not by the gateway of another network that the guest is on: a thousand packets a second through its routers would
	 * be measured with it, on some paths and not on others. */
	if (setsockopt(fd, SOL_SOCKET, SO_DONTROUTE, &on, sizeof on) < 0)
		die("setsockopt");
	puts("ready");
	fflush(stdout);
	for (uint64_t tries = 1; now_ns() < deadline; tries++) {
		struct pollfd event = {fd, POLLIN, 0};
		uint64_t next = now_ns() + (uint64_t)interval_us * 1000u, now;
		/* No route, no interface, no peer: that is what it waits for to end. */
		(void)!sendto(fd, &request, sizeof request, 0, (void *)&address, sizeof address);
		while ((now = now_ns()) < next) {
			struct timespec left = {0, (long)(next - now)};
			if (ppoll(&event, 1, &left, NULL) < 1)
				continue;
			if (recv(fd, &answer, sizeof answer, 0) == (ssize_t)sizeof answer && answer.nonce == request.nonce) {
				printf("{\"first_ns\": %" PRIu64 ", \"tries\": %" PRIu64 "}\n", now_ns(), tries);
				return;
			}
		}
	}
	errno = ETIMEDOUT;
	die("no reply");
}

int main(int argc, char **argv)
{
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	if (argc == 3 && !strcmp(argv[1], "serve"))
		serve(argv[2]);
	else if (argc == 6 && !strcmp(argv[1], "rtt"))
		rtt(argv[2], argv[3], atol(argv[4]), atol(argv[5]));
	else if (argc == 7 && !strcmp(argv[1], "flood"))
		flood(argv[2], argv[3], (size_t)atol(argv[4]), strtoull(argv[5], NULL, 10), strtoull(argv[6], NULL, 10));
	else if (argc == 5 && !strcmp(argv[1], "bulk"))
		bulk(argv[2], argv[3], strtoull(argv[4], NULL, 10));
	else if (argc == 6 && !strcmp(argv[1], "rate"))
		rate(argv[2], argv[3], (size_t)atol(argv[4]), strtoull(argv[5], NULL, 10));
	else if (argc == 6 && !strcmp(argv[1], "first"))
		first(argv[2], argv[3], atol(argv[4]), atol(argv[5]));
	else {
		fputs("netprobe: see the head of netprobe.c\n", stderr);
		return 2;
	}
	return 0;
}
