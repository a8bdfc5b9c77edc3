/*
 * sandbox.c
 *		What keeps a redo process from doing harm and from outliving its use.
 *
 * WAL is untrusted input to code that was written to trust it.  A damaged or
 * forged record may crash the process, and then the client starts another
 * one, but it must not reach anything outside of it.
 */
#include "walredo.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define SANDBOX_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define SANDBOX_ARCH AUDIT_ARCH_AARCH64
#else
#error "the system call filter does not know this architecture"
#endif

/*
 * Die with the client, whether asleep or stuck in a record.  The kernel counts
 * as client the thread that has started us; it stays as long as we do.  Should
 * it have ended already, then nobody reads our hello.
 */
void
sandbox_end_with_client(void)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		elog(FATAL, "could not tie the process to its client: %m");
	signal(SIGPIPE, SIG_IGN);
}

/* ------------------------------------------------------------------ */
/* Crashes                                                            */
/* ------------------------------------------------------------------ */

/* Append a decimal number; async-signal-safe, unlike snprintf. */
static char *
append_number(char *p, unsigned int n)
{
	char		digits[10];
	int			i = 0;

	do
		digits[i++] = '0' + n % 10;
	while ((n /= 10) != 0);
	while (i > 0)
		*p++ = digits[--i];
	*p = '\0';
	return p;
}

/* Tell the client which request killed us, and how. */
static void
on_crash(int signo, siginfo_t *info, void *context)
{
	char		message[100];

	if (signo == SIGSYS)
	{
		strcpy(message, "the redo sandbox refused system call ");
		append_number(message + strlen(message), info->si_syscall);
	}
	else
	{
		strcpy(message, "the redo process was hit by signal ");
		append_number(message + strlen(message), signo);
	}
	respond_failed(message);
	_exit(1);
}

void
sandbox_catch_crashes(void)
{
	static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS};
	struct sigaction action = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_ONSTACK};
	struct rlimit no_core = {0, 0};
	stack_t		stack = {.ss_size = 64 * 1024};

	/* a stack of its own, so that running out of stack is reported too */
	stack.ss_sp = mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (stack.ss_sp == MAP_FAILED || sigaltstack(&stack, NULL) != 0)
		elog(FATAL, "could not set up the signal stack: %m");
	sigfillset(&action.sa_mask);
	for (int i = 0; i < lengthof(signals); i++)
		if (sigaction(signals[i], &action, NULL) != 0)
			elog(FATAL, "could not catch signal %d: %m", signals[i]);
	if (setrlimit(RLIMIT_CORE, &no_core) != 0)
		elog(FATAL, "could not switch off core dumps: %m");
}

/* ------------------------------------------------------------------ */
/* System call filter                                                 */
/* ------------------------------------------------------------------ */

/*
 * Enough to compute, to allocate, to read files that are open already, to
 * answer, to log and to die.  No descriptor can be made any more.
 */
static const int allowed_calls[] = {
	SYS_read, SYS_pread64, SYS_write, SYS_writev, SYS_lseek,
	SYS_brk, SYS_munmap, SYS_mremap, SYS_madvise,
	SYS_clock_gettime, SYS_gettimeofday, SYS_getrandom,
	SYS_futex, SYS_restart_syscall,
	SYS_getpid, SYS_getppid, SYS_gettid,
	SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
	SYS_exit, SYS_exit_group,
};

/*
 * PG 18 redo of in-place updates removes the relation cache's init file: the
 * answer is that there is none.
 */
#ifdef SYS_unlink
#define UNLINK_CALL SYS_unlink
#else
#define UNLINK_CALL SYS_unlinkat
#endif

#define LOAD(field) \
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
/* the low half of an argument, little endian */
#define LOAD_ARGUMENT(n) \
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[n]))
#define SKIP_UNLESS_EQUAL(value, n)	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, n)
#define SKIP_IF_EQUAL(value, n)		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, n, 0)
#define SKIP_IF_SET(bits, n)		BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, bits, n, 0)
#define RETURN(action)				BPF_STMT(BPF_RET | BPF_K, action)

#define ADD(...) (filter[length++] = (struct sock_filter) __VA_ARGS__)

void
sandbox_enter(void)
{
	struct sock_filter filter[32 + 2 * lengthof(allowed_calls)];
	struct sock_fprog program = {.filter = filter};
	int			length = 0;

	ADD(LOAD(arch));
	ADD(SKIP_IF_EQUAL(SANDBOX_ARCH, 1));
	ADD(RETURN(SECCOMP_RET_KILL_PROCESS));

	ADD(LOAD(nr));
	for (int i = 0; i < lengthof(allowed_calls); i++)
	{
		ADD(SKIP_UNLESS_EQUAL(allowed_calls[i], 1));
		ADD(RETURN(SECCOMP_RET_ALLOW));
	}
	ADD(SKIP_UNLESS_EQUAL(UNLINK_CALL, 1));
	ADD(RETURN(SECCOMP_RET_ERRNO | ENOENT));

	/* memory that can be executed is never made */
	ADD(SKIP_UNLESS_EQUAL(SYS_mmap, 3));
	ADD(LOAD_ARGUMENT(2));
	ADD(SKIP_IF_SET(PROT_EXEC, 1));
	ADD(RETURN(SECCOMP_RET_ALLOW));

	/* abort() signals the process itself; other processes are out of reach */
	ADD(LOAD(nr));
	ADD(SKIP_UNLESS_EQUAL(SYS_tgkill, 3));
	ADD(LOAD_ARGUMENT(0));
	ADD(SKIP_UNLESS_EQUAL((uint32) getpid(), 1));
	ADD(RETURN(SECCOMP_RET_ALLOW));

	/* everything else raises SIGSYS, which on_crash() reports */
	ADD(RETURN(SECCOMP_RET_TRAP));

	Assert(length <= lengthof(filter));
	program.len = length;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
		prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
		ereport(FATAL,
				(errmsg("could not install the system call filter: %m"),
				 errhint("The kernel must support seccomp; walredo.sandbox=off runs without it.")));
}
