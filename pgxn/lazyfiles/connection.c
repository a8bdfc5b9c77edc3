/*
 * A libpq connection in CopyBoth mode: sockets, start-up, messages.
 *
 * The simple query "pagestream TENANT TIMELINE" starts CopyBoth.  The socket does not block, so that a
 * process that waits can honour a cancel request.
 */
#include "lazyfiles.h"

#include <dlfcn.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define RECEIVE_BUFFER (LARGEST_MESSAGE + 4096)
#define POLL_INTERVAL_MS 200

static const char *server_address;
static char server_host[256];
static char server_port[16];
static char pagestream_command[256];
static const char *auth_token;

static int	connection = -1;
static uint8_t receive_buffer[RECEIVE_BUFFER];
static size_t received;
static size_t consumed;			/* bytes of the last message, dropped before the next one is read */

/* Postgres' own variables; NULL in other programs that run with the library. */
static volatile const uint32_t *crit_section_count;
static volatile const uint32_t *interrupt_holdoff_count;
static volatile const sig_atomic_t *proc_die_pending;
static volatile const sig_atomic_t *query_cancel_pending;

uint64_t
lazy_now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t) t.tv_sec * 1000 + (uint64_t) t.tv_nsec / 1000000;
}

void
connection_init(const char *address, const char *tenant, const char *timeline, const char *token)
{
	const char *colon = strrchr(address, ':');
	const char *host = address;
	size_t		length;

	if (colon == NULL || colon == address || colon[1] == '\0' || strlen(colon + 1) >= sizeof(server_port))
		lazy_die("ZENITH_LAZYFILES_PAGESERVER=\"%s\" is not HOST:PORT", address);
	length = (size_t) (colon - address);
	if (host[0] == '[' && colon[-1] == ']')
	{
		host++;
		length -= 2;
	}
	if (length == 0 || length >= sizeof(server_host))
		lazy_die("ZENITH_LAZYFILES_PAGESERVER=\"%s\" is not HOST:PORT", address);
	memcpy(server_host, host, length);
	strcpy(server_port, colon + 1);
	if (snprintf(pagestream_command, sizeof(pagestream_command), "pagestream %s %s", tenant,
				 timeline) >= (int) sizeof(pagestream_command))
		lazy_die("ZENITH_LAZYFILES_TENANT or _TIMELINE is too long");
	server_address = address;
	auth_token = token;

	crit_section_count = dlsym(RTLD_DEFAULT, "CritSectionCount");
	interrupt_holdoff_count = dlsym(RTLD_DEFAULT, "InterruptHoldoffCount");
	proc_die_pending = dlsym(RTLD_DEFAULT, "ProcDiePending");
	query_cancel_pending = dlsym(RTLD_DEFAULT, "QueryCancelPending");
}

/*
 * May the read fail with ECANCELED, so that Postgres gets to handle its interrupt?  (FileRead() would
 * repeat EINTR for ever.)  Not where an error would become a PANIC or interrupts are held off.
 */
bool
lazy_interrupted(void)
{
	if (!crit_section_count || !interrupt_holdoff_count || !proc_die_pending || !query_cancel_pending)
		return false;
	return (*proc_die_pending || *query_cancel_pending) &&
		*crit_section_count == 0 && *interrupt_holdoff_count == 0;
}

void
lazy_sleep_us(uint64_t us)
{
	struct timespec t = {.tv_sec = (time_t) (us / 1000000),.tv_nsec = (long) (us % 1000000) * 1000};

	nanosleep(&t, NULL);
}

/* ---- socket ---- */

void
connection_drop(void)
{
	if (connection >= 0)
		syscall(SYS_close, connection);
	connection = -1;
	received = consumed = 0;
}

/* Wait until the socket is ready; false at the deadline or, with errno ECANCELED, at an interrupt. */
static bool
wait_for_socket(int fd, short events, uint64_t deadline)
{
	for (;;)
	{
		struct pollfd p = {.fd = fd,.events = events};
		int			ready = poll(&p, 1, POLL_INTERVAL_MS);

		if (ready > 0)
			return true;
		if (ready < 0 && errno != EINTR)
			return false;
		if (lazy_interrupted())
		{
			errno = ECANCELED;
			return false;
		}
		if (lazy_now_ms() >= deadline)
		{
			errno = ETIMEDOUT;
			return false;
		}
	}
}

static bool
send_all(int fd, const void *data, size_t length, uint64_t deadline)
{
	const uint8_t *p = data;

	while (length > 0)
	{
		ssize_t		n = send(fd, p, length, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n > 0)
		{
			p += n;
			length -= (size_t) n;
		}
		else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		{
			if (!wait_for_socket(fd, POLLOUT, deadline))
				return false;
		}
		else if (n < 0 && errno != EINTR)
			return false;
	}
	return true;
}

/* Read until the buffer holds length bytes; false and errno if it cannot. */
static bool
receive_until(size_t length, uint64_t deadline)
{
	while (received < length)
	{
		ssize_t		n = recv(connection, receive_buffer + received, length - received, MSG_DONTWAIT);

		if (n > 0)
			received += (size_t) n;
		else if (n == 0)
		{
			errno = ECONNRESET;
			return false;
		}
		else if (errno == EAGAIN || errno == EWOULDBLOCK)
		{
			if (!wait_for_socket(connection, POLLIN, deadline))
				return false;
		}
		else if (errno != EINTR)
			return false;
	}
	return true;
}

/*
 * Receive the next message whole.  hint is its probable size: one recv() then does for header and body;
 * what was read beyond a shorter message stays in the buffer.
 */
bool
connection_receive(size_t hint, uint64_t deadline, char *type, const uint8_t **body, size_t *length)
{
	size_t		total;

	if (consumed > 0)
	{
		memmove(receive_buffer, receive_buffer + consumed, received - consumed);
		received -= consumed;
		consumed = 0;
	}
	if (received < MESSAGE_HEADER)
	{
		ssize_t		n;

		while (received < MESSAGE_HEADER)
		{
			n = recv(connection, receive_buffer + received,
					 (hint > MESSAGE_HEADER ? hint : MESSAGE_HEADER) - received, MSG_DONTWAIT);
			if (n > 0)
				received += (size_t) n;
			else if (!receive_until(received + 1, deadline))	/* waits, and finds the error */
				return false;
		}
	}
	total = (size_t) get_u32(receive_buffer + 1) + 1;
	if (total < MESSAGE_HEADER || total > RECEIVE_BUFFER)
	{
		errno = EPROTO;
		return false;
	}
	if (!receive_until(total, deadline))
		return false;
	*type = (char) receive_buffer[0];
	*body = receive_buffer + MESSAGE_HEADER;
	*length = total - MESSAGE_HEADER;
	consumed = total;
	return true;
}

/* The M field of an ErrorResponse. */
const char *
connection_error(const uint8_t *body, size_t length)
{
	const char *p = (const char *) body;
	const char *end = p + length;

	while (p < end && *p != '\0')
	{
		size_t		field = strnlen(p, (size_t) (end - p));

		if (p + field == end)
			break;
		if (*p == 'M')
			return p + 1;
		p += field + 1;
	}
	return "no message";
}

static bool
send_message(int fd, char type, const char *text, uint64_t deadline)
{
	uint8_t		header[MESSAGE_HEADER] = {(uint8_t) type};
	size_t		length = strlen(text) + 1;

	put_u32(header + 1, (uint32_t) length + 4);
	return send_all(fd, header, sizeof(header), deadline) && send_all(fd, text, length, deadline);
}

static bool
send_startup(int fd, uint64_t deadline)
{
	static const char parameters[] = "user\0zenith_admin\0database\0postgres\0application_name\0lazyfiles\0";
	uint8_t		packet[8 + sizeof(parameters)];

	put_u32(put_u32(packet, sizeof(packet)), 3 << 16);
	memcpy(packet + 8, parameters, sizeof(parameters));
	return send_all(fd, packet, sizeof(packet), deadline);
}

/*
 * From the startup packet to CopyBoth.  On failure *reason says why (errno if it is empty).
 */
static bool
handshake(char *reason, size_t size)
{
	uint64_t	deadline = lazy_now_ms() + HANDSHAKE_TIMEOUT_MS;
	char		type;
	const uint8_t *body;
	size_t		length;

	reason[0] = '\0';
	if (!send_startup(connection, deadline))
		return false;
	for (;;)
	{
		if (!connection_receive(0, deadline, &type, &body, &length))
			return false;
		switch (type)
		{
			case 'R':
				if (length >= 4 && get_u32(body) == 3)
				{
					if (auth_token == NULL)
					{
						snprintf(reason, size, "it asks for a password, but ZENITH_AUTH_TOKEN is not set");
						return false;
					}
					if (!send_message(connection, 'p', auth_token, deadline))
						return false;
				}
				else if (length < 4 || get_u32(body) != 0)
				{
					snprintf(reason, size, "it asks for an unsupported kind of authentication");
					return false;
				}
				break;
			case 'Z':
				if (!send_message(connection, 'Q', pagestream_command, deadline))
					return false;
				break;
			case 'W':
				return true;
			case 'E':
				snprintf(reason, size, "%s", connection_error(body, length));
				return false;
			default:			/* parameter status, notice, key data */
				break;
		}
	}
}

static void
set_socket_options(int fd)
{
	const int	one = 1,
				idle = 10,
				interval = 5,
				probes = 3;
	const unsigned user_timeout_ms = 30000;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout_ms, sizeof(user_timeout_ms));
}

static int
dial_address(const struct addrinfo *address)
{
	int			fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int			error = 0;
	socklen_t	length = sizeof(error);

	if (fd < 0)
		return -1;
	set_socket_options(fd);
	if (connect(fd, address->ai_addr, address->ai_addrlen) != 0)
	{
		if (errno == EINPROGRESS && wait_for_socket(fd, POLLOUT, lazy_now_ms() + HANDSHAKE_TIMEOUT_MS) &&
			getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0)
			errno = error;
		else
			error = errno;
		if (error != 0)
		{
			syscall(SYS_close, fd);
			errno = error;
			return -1;
		}
	}
	return fd;
}

static bool
dial(char *reason, size_t size)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM,.ai_flags = AI_NUMERICHOST};
	struct addrinfo *addresses = NULL;
	int			failure = getaddrinfo(server_host, server_port, &hints, &addresses);

	if (failure != 0)
	{
		hints.ai_flags = 0;
		failure = getaddrinfo(server_host, server_port, &hints, &addresses);
	}
	reason[0] = '\0';
	if (failure != 0)
	{
		snprintf(reason, size, "%s", gai_strerror(failure));
		return false;
	}
	for (struct addrinfo *a = addresses; a != NULL && connection < 0; a = a->ai_next)
		connection = dial_address(a);
	freeaddrinfo(addresses);
	return connection >= 0;
}

/* Connect and start CopyBoth, once.  On failure *reason says why. */
bool
connection_open(char *reason, size_t size)
{
	if (dial(reason, size) && handshake(reason, size))
		return true;
	if (reason[0] == '\0')
		snprintf(reason, size, "%s", strerror(errno));
	connection_drop();
	return false;
}

bool
connection_is_open(void)
{
	return connection >= 0;
}

/* Send bytes; false with errno set if that fails, the connection is useless then. */
bool
connection_send(const void *data, size_t length)
{
	return send_all(connection, data, length, lazy_now_ms() + HANDSHAKE_TIMEOUT_MS);
}

/* HOST:PORT, for messages. */
const char *
connection_address(void)
{
	return server_address;
}
