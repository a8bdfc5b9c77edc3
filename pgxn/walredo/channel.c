/*
 * channel.c
 *		Buffered requests in, buffered responses out.
 */
#include "walredo.h"

#include <signal.h>
#include <unistd.h>

#include "miscadmin.h"

#define INPUT_SIZE		((size_t) 256 * 1024)
#define OUTPUT_SIZE		((size_t) 256 * 1024)

static const int input_fd = STDIN_FILENO;
static int	output_fd = -1;

/* unread input is input[input_pos .. input_len) */
static char *input;
static size_t input_size;
static size_t input_pos;
static size_t input_len;

/* what the current request still holds beyond what was taken */
static uint64 request_left;
static volatile sig_atomic_t in_request = false;

static char *output;
static volatile size_t output_len;

/* set while a signal handler must not touch the output */
static volatile sig_atomic_t output_busy = false;

static inline void
set_output_busy(bool busy)
{
	/* the compiler must not move work on the output across this */
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	output_busy = busy;
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static void *
allocate(void *old, size_t size)
{
	void	   *p = realloc(old, size);

	if (p == NULL)
		elog(FATAL, "out of memory for a buffer of %zu bytes", size);
	return p;
}

/*
 * Take the protocol's descriptors.  Nothing else may write into the response
 * stream, so standard output becomes a copy of standard error.
 */
void
channel_open(void)
{
	output_fd = dup(STDOUT_FILENO);
	if (output_fd < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0)
		elog(FATAL, "could not set up the response stream: %m");
	input = allocate(NULL, INPUT_SIZE);
	input_size = INPUT_SIZE;
	output = allocate(NULL, OUTPUT_SIZE);
}

static void
write_all(const char *p, size_t n)
{
	while (n > 0)
	{
		ssize_t		done = write(output_fd, p, n);

		if (done < 0)
		{
			if (errno == EINTR)
				continue;
			_exit(1);			/* the client is gone */
		}
		p += done;
		n -= done;
	}
}

void
channel_flush(void)
{
	set_output_busy(true);
	write_all(output, output_len);
	output_len = 0;
	set_output_busy(false);
}

/*
 * Send complete responses from a signal handler that interrupted redo.  If it
 * interrupted this file instead, the interrupted code will send them.
 */
void
channel_flush_from_signal(void)
{
	if (!output_busy && output_fd >= 0)
		channel_flush();
}

void
respond(uint32 status, const void *payload, size_t length)
{
	ResponseHeader header;

	header.length = length;
	header.status = status;
	Assert(sizeof(header) + length <= OUTPUT_SIZE);
	if (output_len + sizeof(header) + length > OUTPUT_SIZE)
		channel_flush();
	set_output_busy(true);
	memcpy(output + output_len, &header, sizeof(header));
	memcpy(output + output_len + sizeof(header), payload, length);
	output_len += sizeof(header) + length;
	set_output_busy(false);
}

/* Report the failure of the current request; async-signal-safe. */
void
respond_failed(const char *message)
{
	if (!request_in_progress() || output_busy)
		return;
	respond(RESPONSE_FAILED, message, strnlen(message, 4096));
	channel_flush();
}

/*
 * Make n unread bytes available at input + input_pos.  False at end of file.
 */
static bool
fill(size_t n)
{
	if (input_len - input_pos >= n)
		return true;
	if (input_pos + n > input_size || input_pos == input_len)
	{
		memmove(input, input + input_pos, input_len - input_pos);
		input_len -= input_pos;
		input_pos = 0;
	}
	if (n > input_size)
	{
		input = allocate(input, n);
		input_size = n;
	}
	while (input_len - input_pos < n)
	{
		ssize_t		got;

		if (output_len > 0)
			channel_flush();	/* the client may be waiting for these */
		got = read(input_fd, input + input_len, input_size - input_len);
		if (got == 0)
			return false;
		if (got < 0)
		{
			if (errno == EINTR)
				continue;
			elog(FATAL, "could not read a request: %m");
		}
		input_len += got;
	}
	return true;
}

/*
 * Next n bytes of the stream.  They stay valid until the next call, because
 * only fill() moves the buffer's content.
 */
static void *
take(size_t n)
{
	void	   *p;

	if (!fill(n))
		_exit(0);				/* the client is gone: nobody to answer */
	p = input + input_pos;
	input_pos += n;
	return p;
}

/* Wait for the next request.  False when the client has closed the stream. */
bool
request_begin(RequestHeader *header)
{
	if (!fill(sizeof(*header)))
		return false;
	memcpy(header, take(sizeof(*header)), sizeof(*header));
	request_left = header->length;
	in_request = true;
	return true;
}

/*
 * Take the next item of the current request.  The result is MAXALIGNed and
 * valid until the next call.  NULL if the request does not hold that much.
 */
void *
request_take(size_t size)
{
	size_t		padded = MAXALIGN(size);

	if (padded < size || padded > request_left)
		return NULL;
	request_left -= padded;
	return take(padded);
}

/* Skip what is left of the current request. */
void
request_end(void)
{
	while (request_left > 0)
	{
		size_t		n = Min(request_left, INPUT_SIZE);

		(void) take(n);
		request_left -= n;
	}
	in_request = false;
	if (input_size > INPUT_SIZE && input_len - input_pos <= INPUT_SIZE)
	{
		/* a huge record has come and gone */
		memmove(input, input + input_pos, input_len - input_pos);
		input_len -= input_pos;
		input_pos = 0;
		input = allocate(input, INPUT_SIZE);
		input_size = INPUT_SIZE;
	}
}

bool
request_in_progress(void)
{
	return in_request;
}
