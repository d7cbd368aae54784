/* A target that makes the same system calls over and over, each in a thread of its own, and writes down what came of
 * them, so that a run that was disturbed can be compared with one that was not.
 *
 * mover_syscalls FILE TURNS
 *
 * FILE is mapped shared. In even turns a call times out where it can, in odd ones it gets what it waits for, from a
 * feeder thread, some milliseconds later. A record is the call's value, errno, what else it gave (events, the rest of
 * the time, a child's exit code), and whether it came back too early or far too late.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CALLS 12
#define MAX_TURNS 512
#define TIMEOUT_MS 20
#define FEED_MS 8
#define LATE_MS 50000
#define SENTINEL 77

struct record {
    int64_t value, error, more, untimely;
};

static struct control {
    volatile uint64_t ready, finished, base, size;
    struct record records[CALLS][MAX_TURNS];
} *control;

struct waiter {
    int number, pipe[2], epoll, listener;
    pthread_t thread;
    struct sockaddr_storage address;
    socklen_t length;
    aio_context_t context;
    struct iocb block;
    volatile int wants; /* the number of the turn that waits to be fed, or 0 */
    volatile int word, idle;
};

static struct waiter waiters[CALLS];
static int semaphores, turns;
static __thread volatile sig_atomic_t handled;

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void nap(int milliseconds)
{
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    while (nanosleep(&time, &time) && errno == EINTR)
        ;
}

static const struct timespec brief = {0, TIMEOUT_MS * 1000000}, ample = {60, 0};

static void call_nanosleep(struct waiter *w, int event, struct record *r)
{
    struct timespec rest = {SENTINEL, SENTINEL};
    (void)w, (void)event;
    r->value = nanosleep(&brief, &rest);
    /* The kernel writes there at every stop; it means something to the caller of a call that failed. */
    r->more = r->value ? rest.tv_sec * 1000 + rest.tv_nsec : 0;
}

static void call_poll(struct waiter *w, int event, struct record *r)
{
    struct pollfd fd = {w->pipe[0], POLLIN, 0};
    char byte;
    r->value = poll(&fd, 1, event ? 60000 : TIMEOUT_MS);
    r->more = fd.revents;
    if (fd.revents && read(w->pipe[0], &byte, 1) != 1)
        r->more = -1;
}

static void call_epoll_wait(struct waiter *w, int event, struct record *r)
{
    struct epoll_event found = {0};
    char byte;
    r->value = epoll_wait(w->epoll, &found, 1, event ? 60000 : TIMEOUT_MS);
    r->more = found.events;
    if (found.events && read(w->pipe[0], &byte, 1) != 1)
        r->more = -1;
}

static void call_futex(struct waiter *w, int event, struct record *r)
{
    /* A wake-up that comes too late for one turn must not end the next. */
    r->value = syscall(SYS_futex, event ? &w->word : &w->idle, FUTEX_WAIT, 0, event ? &ample : &brief, NULL, 0);
}

static void call_read(struct waiter *w, int event, struct record *r)
{
    char byte = 0;
    (void)event;
    r->value = read(w->pipe[0], &byte, 1);
    r->more = byte;
}

static void call_accept(struct waiter *w, int event, struct record *r)
{
    (void)event;
    int fd = accept(w->listener, NULL, NULL);
    r->value = fd >= 0;
    close(fd);
}

static void call_recv(struct waiter *w, int event, struct record *r)
{
    struct timeval timeout = {event ? 60 : 0, event ? 0 : TIMEOUT_MS * 1000};
    char byte = 0;
    setsockopt(w->pipe[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    r->value = recv(w->pipe[0], &byte, 1, 0);
    r->more = byte;
}

static void call_sigtimedwait(struct waiter *w, int event, struct record *r)
{
    sigset_t set;
    siginfo_t info = {0};
    (void)w;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    r->value = sigtimedwait(&set, &info, event ? &ample : &brief);
    r->more = info.si_code;
}

static void call_semop(struct waiter *w, int event, struct record *r)
{
    struct sembuf down = {0, -1, 0};
    (void)w;
    r->value = event ? semop(semaphores, &down, 1) : semtimedop(semaphores, &down, 1, &brief);
}

static void call_io_getevents(struct waiter *w, int event, struct record *r)
{
    struct io_event found = {0};
    struct iocb *block = &w->block;
    struct timespec timeout = event ? ample : brief;
    char byte;
    if (event) {
        memset(block, 0, sizeof *block);
        block->aio_lio_opcode = IOCB_CMD_POLL;
        block->aio_fildes = w->pipe[0];
        block->aio_buf = POLLIN;
        if (syscall(SYS_io_submit, w->context, 1, &block) != 1)
            r->untimely = 9;
    }
    r->value = syscall(SYS_io_getevents, w->context, 1, 1, &found, &timeout);
    int error = errno;
    r->more = found.res;
    if (event && read(w->pipe[0], &byte, 1) != 1)
        r->more = -1;
    errno = error;
}

static void call_waitpid(struct waiter *w, int event, struct record *r)
{
    int status = 0;
    (void)w;
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        nap(event ? FEED_MS : TIMEOUT_MS);
        _exit(40 + event);
    }
    r->value = waitpid(child, &status, 0) == child;
    r->more = WEXITSTATUS(status);
}

static void call_pause(struct waiter *w, int event, struct record *r)
{
    (void)w, (void)event;
    int before = handled;
    r->value = pause();
    r->more = handled != before;
}

static void (*const calls[CALLS])(struct waiter *, int, struct record *) = {
    call_nanosleep, call_poll, call_epoll_wait, call_futex, call_read, call_accept,
    call_recv, call_sigtimedwait, call_semop, call_io_getevents, call_waitpid, call_pause,
};

/* Which of them can time out; the others get what they wait for in every turn. */
static int times_out(int number)
{
    return calls[number] != call_read && calls[number] != call_accept && calls[number] != call_pause;
}

static void *run(void *argument)
{
    struct waiter *w = argument;
    for (int turn = 0; turn < turns; turn++) {
        struct record *r = &control->records[w->number][turn];
        int event = turn % 2 || !times_out(w->number);
        int64_t begun = now();
        w->wants = event ? turn + 1 : 0;
        errno = 0;
        calls[w->number](w, event, r);
        r->error = r->value < 0 ? errno : 0;
        w->wants = 0;
        int64_t took = now() - begun;
        /* The timeout of a socket is counted in ticks, of which an emulated machine may owe some. */
        if (!event && calls[w->number] != call_recv && took < TIMEOUT_MS * 1000000ll)
            r->untimely = 1;
        if (took > LATE_MS * 1000000ll)
            r->untimely = 2;
        nap(1);
    }
    __atomic_fetch_add((uint64_t *)&control->finished, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void feed_once(struct waiter *w)
{
    struct sembuf up = {0, 1, 0};
    char byte = 5;
    if (calls[w->number] == call_accept) {
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        connect(fd, (struct sockaddr *)&w->address, w->length);
        close(fd);
    } else if (calls[w->number] == call_sigtimedwait) {
        pthread_kill(w->thread, SIGUSR1);
    } else if (calls[w->number] == call_semop) {
        semop(semaphores, &up, 1);
    } else if (write(w->pipe[1], &byte, 1) != 1) {
        exit(3);
    }
}

static void *feed(void *argument)
{
    struct waiter *w = argument;
    for (int served = 0;;) {
        int turn = w->wants;
        if (turn == served || !turn) {
            nap(1);
            continue;
        }
        served = turn;
        nap(FEED_MS);
        /* A wake-up and the signal for pause are lost on a thread that does not wait yet, or again: insist. */
        if (calls[w->number] == call_futex || calls[w->number] == call_pause)
            while (w->wants == turn) {
                if (calls[w->number] == call_futex)
                    syscall(SYS_futex, &w->word, FUTEX_WAKE, 1, NULL, NULL, 0);
                else
                    pthread_kill(w->thread, SIGUSR2);
                nap(2);
            }
        else if (calls[w->number] != call_nanosleep && calls[w->number] != call_waitpid)
            feed_once(w);
    }
    return NULL;
}

static void on_user(int number)
{
    (void)number;
    handled++;
}

static void prepare(struct waiter *w, int number)
{
    struct epoll_event event = {.events = EPOLLIN};
    struct sockaddr unnamed = {.sa_family = AF_UNIX};
    w->number = number;
    if (calls[number] == call_recv ? socketpair(AF_UNIX, SOCK_STREAM, 0, w->pipe) : pipe(w->pipe))
        exit(2);
    w->epoll = epoll_create1(0);
    epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->pipe[0], &event);
    w->listener = socket(AF_UNIX, SOCK_STREAM, 0);
    bind(w->listener, &unnamed, sizeof(sa_family_t));
    listen(w->listener, 1);
    w->length = sizeof w->address;
    getsockname(w->listener, (struct sockaddr *)&w->address, &w->length);
    if (calls[number] == call_io_getevents && syscall(SYS_io_setup, 4, &w->context))
        exit(2);
}

int main(int count, char **words)
{
    if (count != 3 || (turns = atoi(words[2])) > MAX_TURNS)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = open(words[1], O_RDWR);
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    const size_t size = 256 * sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory = (char *)(((uintptr_t)memory + size - 1) / size * size);
    memset(memory, 7, size);
    semaphores = semget(IPC_PRIVATE, 1, 0600);
    /* Without SA_RESTART, so that pause is not the only call that would notice. */
    struct sigaction action = {.sa_handler = on_user};
    sigaction(SIGUSR2, &action, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    control->base = (uint64_t)memory;
    control->size = size;
    for (int i = 0; i < CALLS; i++)
        prepare(&waiters[i], i);
    control->ready = 1;
    for (int i = 0; i < CALLS; i++) {
        pthread_t feeder;
        pthread_create(&waiters[i].thread, NULL, run, &waiters[i]);
        pthread_create(&feeder, NULL, feed, &waiters[i]);
    }
    for (int i = 0; i < CALLS; i++)
        pthread_join(waiters[i].thread, NULL);
    semctl(semaphores, 0, IPC_RMID);
    return 0;
}
