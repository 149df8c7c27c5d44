/*
 * Runs processes in a VM of the lab for the host: one connection on vsock, one process.
 *
 * Frames both ways: length of the payload (32 bits, big-endian), type (8 bits), payload. lab/vm/processes.py is the
 * other side.
 *
 *   host to VM  S  start: NUL-terminated fields, each a letter and its value:
 *                    a argument   e NAME=value   d directory   i standard input is wanted (else /dev/null)
 *                    t "ROWS COLUMNS": a terminal
 *                    p FILE       the arguments are an OCI runtime's that leaves a process behind: its pid is in FILE
 *                    s PATH       ... which sends its terminal to this Unix socket
 *                    l FILE       ... and says in FILE why it failed
 *               I  standard input; at most WINDOW bytes more than were acknowledged
 *               C  end of standard input
 *               K  a signal's number (8 bits)
 *               W  the terminal's rows and columns (16 bits each, big-endian)
 *   VM to host  P  the process runs; its pid (32 bits, big-endian)
 *               E  it could not be started: text
 *               A  so many bytes of standard input (32 bits, big-endian) were taken
 *               O  standard output (and all of a terminal's)    R  standard error
 *               X  it ended: exit code, or minus the signal's number (32 bits, big-endian); after its own output
 *               Z  the end of its output; the last frame
 *
 * A connection that the host closes ends the process. Only the host (CID 2) is served.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#define PORT 1024
#define WINDOW 65536
#define MAX_FRAME (1 << 20)
#define HEAD 5
/* vhost-device-vsock loses packets of which the kernel makes three descriptors, so a write stays below 28 KiB. */
#define CHUNK 16384
#define MAX_FIELDS 8192
#define PIPE 65536 /* a pipe's size: as much as a process can have left in one */

struct process {
	int connection;
	pid_t pid;
	bool ended, reported;
	size_t rest; /* what it can have left in its streams when it ended */
	int status;
	bool alone; /* in a session of its own, which is ended with it */
	int in, out, err; /* ours of its streams; -1: closed */
	bool terminal;

	uint8_t *frame; /* what has arrived of the next one */
	size_t received;
	uint8_t input[WINDOW];
	size_t input_size;
	bool input_ends;
	uint8_t output[HEAD + CHUNK]; /* what waits to be sent: one frame */
	size_t output_size, output_sent;
	uint32_t taken; /* of its input, not yet acknowledged */
};

static void set_flags(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* There must be room: nothing else waits to be sent. */
static void put_frame(struct process *p, char type, const void *payload, size_t size)
{
	uint32_t length = htonl((uint32_t)size);

	memcpy(p->output, &length, 4);
	p->output[4] = (uint8_t)type;
	if (payload)
		memcpy(p->output + HEAD, payload, size);
	p->output_size = HEAD + size;
	p->output_sent = 0;
}

static void put_number(struct process *p, char type, uint32_t number)
{
	number = htonl(number);
	put_frame(p, type, &number, 4);
}

/* Sends what waits. False when the connection is gone. */
static bool send_waiting(struct process *p)
{
	while (p->output_sent < p->output_size) {
		ssize_t sent = send(p->connection, p->output + p->output_sent, p->output_size - p->output_sent, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN)
			return true;
		if (sent <= 0)
			return false;
		p->output_sent += (size_t)sent;
	}
	p->output_size = p->output_sent = 0;
	return true;
}

static void send_all(struct process *p)
{
	while (p->output_size && send_waiting(p)) {
		struct pollfd wait = {p->connection, POLLOUT, 0};
		if (p->output_size)
			poll(&wait, 1, -1);
	}
}

static void refuse(struct process *p, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
static void refuse(struct process *p, const char *format, ...)
{
	char text[4096];
	va_list arguments;

	va_start(arguments, format);
	int size = vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	put_frame(p, 'E', text, size < (int)sizeof(text) ? (size_t)size : sizeof(text) - 1);
	send_all(p);
	exit(1);
}

struct request {
	char *arguments[MAX_FIELDS], *environment[MAX_FIELDS];
	size_t argument_count, environment_count;
	const char *directory, *pid_file, *console_socket, *log;
	bool input, terminal;
	struct winsize size;
};

static void read_request(struct process *p, char *text, size_t size, struct request *request)
{
	unsigned rows = 24, columns = 80;

	if (!size || text[size - 1])
		refuse(p, "the request has no end");
	for (char *field = text; field < text + size; field += strlen(field) + 1) {
		char *value = field + 1;
		switch (*field) {
		case 'a':
			if (request->argument_count < MAX_FIELDS - 1)
				request->arguments[request->argument_count++] = value;
			else
				refuse(p, "argument list too long");
			break;
		case 'e':
			if (request->environment_count < MAX_FIELDS - 1)
				request->environment[request->environment_count++] = value;
			else
				refuse(p, "argument list too long");
			break;
		case 'd':
			request->directory = value;
			break;
		case 'i':
			request->input = true;
			break;
		case 't':
			request->terminal = true;
			sscanf(value, "%u %u", &rows, &columns);
			break;
		case 'p':
			request->pid_file = value;
			break;
		case 's':
			request->console_socket = value;
			break;
		case 'l':
			request->log = value;
			break;
		default:
			refuse(p, "field %d of the request is not known", *field);
		}
	}
	request->size.ws_row = (unsigned short)rows;
	request->size.ws_col = (unsigned short)columns;
	if (!request->argument_count)
		refuse(p, "no command");
}

static void make_pipe(struct process *p, int ends[2])
{
	if (pipe2(ends, O_CLOEXEC))
		refuse(p, "no pipe: %s", strerror(errno));
}

/* Looked up in PATH of the environment that the program is given, as execvpe(3) has it with ours. */
static void become(const struct request *request)
{
	for (size_t i = 0; i < request->environment_count; i++)
		if (!strncmp(request->environment[i], "PATH=", 5))
			setenv("PATH", request->environment[i] + 5, 1);
	execvpe(request->arguments[0], request->arguments, request->environment);
}

/* Starts the program; its end of streams are given, failures to execute come through a pipe. */
static pid_t spawn(struct process *p, const struct request *request, int in, int out, int err, const char *tty)
{
	int failure[2];
	int number = 0;

	make_pipe(p, failure);
	pid_t pid = fork();
	if (pid < 0)
		refuse(p, "no process: %s", strerror(errno));
	if (!pid) {
		sigset_t none;
		const char *what = request->arguments[0];

		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		signal(SIGPIPE, SIG_DFL);
		setsid();
		if (tty) {
			in = out = err = open(tty, O_RDWR);
			if (in < 0)
				goto failed;
			ioctl(in, TIOCSCTTY, 0);
			ioctl(in, TIOCSWINSZ, &request->size);
		}
		if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0)
			goto failed;
		if (tty && in > 2)
			close(in);
		if (request->directory && chdir(request->directory)) {
			what = request->directory;
			goto failed;
		}
		become(request);
	failed:
		number = errno;
		char text[512];
		int size = snprintf(text, sizeof(text), "%s: %s", what, strerror(number));
		if (write(failure[1], text, (size_t)size) < 0)
			_exit(126);
		_exit(127);
	}
	close(failure[1]);
	char text[512];
	ssize_t got;
	while ((got = read(failure[0], text, sizeof(text))) < 0 && errno == EINTR)
		;
	close(failure[0]);
	if (got > 0)
		refuse(p, "%.*s", (int)got, text);
	return pid;
}

/* The terminal that the runtime has sent to its console socket. */
static int receive_terminal(struct process *p, int listener)
{
	struct cmsghdr *header;
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	char data[256];
	struct iovec part = {data, sizeof(data)};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	int fd = -1;

	int peer = accept(listener, NULL, NULL);
	if (peer < 0 || recvmsg(peer, &message, MSG_CMSG_CLOEXEC) < 0)
		refuse(p, "the runtime sent no terminal: %s", strerror(errno));
	for (header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header))
		if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
			memcpy(&fd, CMSG_DATA(header), sizeof(fd));
	close(peer);
	if (fd < 0)
		refuse(p, "the runtime sent no terminal");
	return fd;
}

static size_t read_text(const char *path, char *text, size_t size)
{
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = file < 0 ? -1 : read(file, text, size - 1);

	if (file >= 0)
		close(file);
	text[got < 0 ? 0 : got] = 0;
	return got < 0 ? 0 : (size_t)got;
}

/* Waits for the runtime's own end, and takes over the process that it has left us. */
static void adopt(struct process *p, const struct request *request, pid_t runtime)
{
	char text[3072];
	int status;

	while (waitpid(runtime, &status, 0) < 0 && errno == EINTR)
		;
	if (status) {
		if (!request->log || !read_text(request->log, text, sizeof(text)))
			snprintf(text, sizeof(text), "%s failed without a word (%d)", request->arguments[0], status);
		refuse(p, "%s", text);
	}
	read_text(request->pid_file, text, sizeof(text));
	p->pid = (pid_t)atoi(text);
	if (p->pid <= 0)
		refuse(p, "%s left no pid", request->arguments[0]);
}

static void start(struct process *p, const struct request *request)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};

	p->terminal = request->terminal;
	if (request->terminal && !request->pid_file) {
		int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
		if (master < 0 || grantpt(master) || unlockpt(master))
			refuse(p, "no terminal: %s", strerror(errno));
		p->pid = spawn(p, request, -1, -1, -1, ptsname(master));
		p->out = master;
	} else if (request->terminal) {
		struct sockaddr_un address = {.sun_family = AF_UNIX};
		int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

		snprintf(address.sun_path, sizeof(address.sun_path), "%s", request->console_socket);
		unlink(address.sun_path);
		if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) || listen(listener, 1))
			refuse(p, "no socket for the terminal: %s", strerror(errno));
		pid_t runtime = spawn(p, request, null, null, null, NULL);
		adopt(p, request, runtime);
		fcntl(listener, F_SETFL, O_NONBLOCK); /* it was sent before the runtime ended */
		p->out = receive_terminal(p, listener);
		close(listener);
		unlink(address.sun_path);
		ioctl(p->out, TIOCSWINSZ, &request->size);
	} else {
		make_pipe(p, out);
		make_pipe(p, err);
		if (request->input)
			make_pipe(p, in);
		pid_t pid = spawn(p, request, request->input ? in[0] : null, out[1], err[1], NULL);
		if (request->pid_file)
			adopt(p, request, pid);
		else
			p->pid = pid;
		close(out[1]);
		close(err[1]);
		if (in[0] >= 0)
			close(in[0]);
		p->in = in[1];
		p->out = out[0];
		p->err = err[0];
	}
	close(null);
	p->alone = !request->pid_file;
	if (p->terminal && request->input)
		p->in = dup(p->out);
	if (p->out >= 0)
		set_flags(p->out);
	if (p->err >= 0)
		set_flags(p->err);
	if (p->in >= 0)
		set_flags(p->in);
	put_number(p, 'P', (uint32_t)p->pid);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void signal_process(struct process *p, int number)
{
	if (!p->ended)
		kill(p->pid, number);
}

static void take_frame(struct process *p, char type, uint8_t *payload, size_t size)
{
	switch (type) {
	case 'I':
		if (size > WINDOW - p->input_size)
			exit(1); /* more than was acknowledged */
		memcpy(p->input + p->input_size, payload, size);
		p->input_size += size;
		break;
	case 'C':
		p->input_ends = true;
		break;
	case 'K':
		if (size == 1)
			signal_process(p, payload[0]);
		break;
	case 'W':
		if (size == 4 && p->terminal && p->out >= 0) {
			struct winsize window = {.ws_row = (unsigned short)(payload[0] << 8 | payload[1]),
						 .ws_col = (unsigned short)(payload[2] << 8 | payload[3])};
			ioctl(p->out, TIOCSWINSZ, &window);
		}
		break;
	default:
		exit(1);
	}
}

/* Reads frames. False when the connection is gone. */
static bool receive(struct process *p, bool starting, struct request *request)
{
	for (;;) {
		uint32_t length = 0;
		size_t wanted = HEAD;

		if (p->received >= HEAD) {
			memcpy(&length, p->frame, 4);
			length = ntohl(length);
			if (length > MAX_FRAME)
				return false;
			wanted = HEAD + length;
			if (p->received == wanted) {
				p->received = 0;
				if (starting) {
					if (p->frame[4] != 'S')
						return false;
					read_request(p, (char *)p->frame + HEAD, length, request);
					start(p, request);
					return true;
				}
				take_frame(p, (char)p->frame[4], p->frame + HEAD, length);
				continue;
			}
		}
		ssize_t got = recv(p->connection, p->frame + p->received, wanted - p->received, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == EAGAIN)
			return true;
		if (got <= 0)
			return false;
		p->received += (size_t)got;
	}
}

static void write_input(struct process *p)
{
	while (p->input_size) {
		ssize_t written = p->in < 0 ? (ssize_t)p->input_size : write(p->in, p->input, p->input_size);
		if (written < 0 && errno == EINTR)
			continue;
		if (written < 0 && errno == EAGAIN)
			return;
		if (written < 0) { /* nobody reads it any more: what comes is lost, as in a closed pipe */
			close_fd(&p->in);
			continue;
		}
		p->input_size -= (size_t)written;
		p->taken += (uint32_t)written;
		memmove(p->input, p->input + written, p->input_size);
	}
	if (p->input_ends && !p->terminal)
		close_fd(&p->in);
}

/* Puts a frame of output if there is any. */
static void read_output(struct process *p, int *fd, char type)
{
	ssize_t got = read(*fd, p->output + HEAD, CHUNK);

	if (got > 0) {
		put_frame(p, type, NULL, (size_t)got);
		p->rest -= p->rest < (size_t)got ? p->rest : (size_t)got;
	} else if (got == 0 || (errno != EAGAIN && errno != EINTR)) /* EIO: a terminal's other side is closed */
		close_fd(fd);
}

/*
 * Puts a frame of what the process has left in its streams. False when there is nothing more of it; what others write
 * there goes on.
 */
static bool read_rest(struct process *p)
{
	if (p->rest && p->out >= 0)
		read_output(p, &p->out, 'O');
	if (p->rest && p->err >= 0 && !p->output_size)
		read_output(p, &p->err, 'R');
	return p->output_size;
}

/* All children that have ended: the process, and what it left behind. */
static void reap(struct process *p)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid != p->pid)
			continue;
		p->ended = true;
		p->rest = 2 * PIPE;
		p->status = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
	}
}

static void serve(int connection)
{
	static struct process process = {.in = -1, .out = -1, .err = -1};
	static struct request request;
	struct process *p = &process;
	sigset_t ended;

	p->connection = connection;
	p->frame = malloc(HEAD + MAX_FRAME);
	if (!p->frame)
		exit(1);
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); /* what a runtime leaves behind becomes our child */
	sigemptyset(&ended);
	sigaddset(&ended, SIGCHLD);
	sigprocmask(SIG_BLOCK, &ended, NULL);
	int signals = signalfd(-1, &ended, SFD_CLOEXEC | SFD_NONBLOCK);
	if (!receive(p, true, &request) || !p->pid)
		exit(1);
	set_flags(connection);
	reap(p);
	for (;;) {
		if (!p->output_size) {
			if (p->taken) {
				put_number(p, 'A', p->taken);
				p->taken = 0;
			} else if (p->ended && !p->reported && !read_rest(p)) {
				put_number(p, 'X', (uint32_t)p->status);
				p->reported = true;
			} else if (p->reported && p->out < 0 && p->err < 0) {
				put_frame(p, 'Z', NULL, 0);
				send_all(p);
				exit(0);
			}
			if (p->output_size && !send_waiting(p))
				break;
		}
		bool room = !p->output_size;
		struct pollfd waits[] = {
			{p->connection, (short)(POLLIN | (p->output_size ? POLLOUT : 0)), 0},
			{signals, POLLIN, 0},
			{room ? p->out : -1, POLLIN, 0},
			{room ? p->err : -1, POLLIN, 0},
			{p->input_size ? p->in : -1, POLLOUT, 0},
		};
		bool more = room && (p->taken || (p->ended && !p->reported) || (p->reported && p->out < 0 && p->err < 0));
		if (poll(waits, sizeof(waits) / sizeof(*waits), more ? 0 : -1) < 0 && errno != EINTR)
			break;
		if (waits[1].revents) {
			struct signalfd_siginfo info;
			while (read(signals, &info, sizeof(info)) > 0)
				;
			reap(p);
		}
		if (waits[0].revents & (POLLIN | POLLHUP | POLLERR) && !receive(p, false, NULL))
			break;
		write_input(p);
		if (!send_waiting(p))
			break;
		if (waits[2].revents && !p->output_size && p->out >= 0)
			read_output(p, &p->out, 'O');
		if (waits[3].revents && !p->output_size && p->err >= 0)
			read_output(p, &p->err, 'R');
		if (!send_waiting(p))
			break;
	}
	/* The host is gone: so is the process, and what is in its session; not what it left when it ended by itself. */
	if (!p->ended) {
		if (p->alone)
			kill(-p->pid, SIGHUP);
		kill(p->alone ? -p->pid : p->pid, SIGKILL);
	}
	exit(0);
}

int main(void)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = PORT};
	uint64_t buffer = 8 << 20; /* also what many small packets may take */
	int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	signal(SIGCHLD, SIG_IGN); /* those who serve connections; they set it back for their own children */
	if (listener < 0 || setsockopt(listener, AF_VSOCK, SO_VM_SOCKETS_BUFFER_MAX_SIZE, &buffer, sizeof(buffer)) ||
	    setsockopt(listener, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &buffer, sizeof(buffer)) ||
	    bind(listener, (void *)&address, sizeof(address)) || listen(listener, 64)) {
		fprintf(stderr, "cannot listen on vsock port %d: %s\n", PORT, strerror(errno));
		return 1;
	}
	for (;;) {
		struct sockaddr_vm peer;
		socklen_t size = sizeof(peer);
		int connection = accept4(listener, (void *)&peer, &size, SOCK_CLOEXEC);
		if (connection < 0) {
			if (errno != EINTR && errno != ECONNABORTED)
				poll(NULL, 0, 100); /* out of descriptors or memory: later */
			continue;
		}
		if (peer.svm_cid == VMADDR_CID_HOST && !fork()) {
			signal(SIGCHLD, SIG_DFL);
			close(listener);
			serve(connection);
		}
		close(connection);
	}
}
