/* A target whose threads sit in system calls that a stop interrupts, each in another one.
 *
 * mover_waiters FILE
 *
 * FILE is mapped shared. state[i] is 1 while thread i waits, 2 when its call has returned what it had to, and 3 when
 * it returned anything else, with errno in error[i]. Once `stop` is set, what they wait for is made to happen.
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
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WAITERS 16
#define NANOSLEEP_SECONDS 2

struct control {
    volatile uint64_t stop, ready, base, size;
    volatile uint64_t state[32], error[32];
};

static struct control *control;
static int pipes[WAITERS][2], pair[2], listener, semaphores;
static int futex_word;
static volatile sig_atomic_t handled;
static struct sockaddr_storage address;
static socklen_t address_length = sizeof address;

static int wait_nanosleep(int self)
{
    struct timespec begun, ended, time = {NANOSLEEP_SECONDS, 0};
    (void)self;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    if (nanosleep(&time, NULL))
        return -1;
    clock_gettime(CLOCK_MONOTONIC, &ended);
    double slept = ended.tv_sec - begun.tv_sec + (ended.tv_nsec - begun.tv_nsec) * 1e-9;
    return slept >= NANOSLEEP_SECONDS && slept < NANOSLEEP_SECONDS + 60 ? 0 : -1;
}

static int wait_poll(int self)
{
    struct pollfd poll_fd = {pipes[self][0], POLLIN, 0};
    return poll(&poll_fd, 1, 60000) == 1 ? 0 : -1;
}

static int wait_select(int self)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(pipes[self][0], &set);
    return select(pipes[self][0] + 1, &set, NULL, NULL, NULL) == 1 ? 0 : -1;
}

static int epoll_of(int self)
{
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, pipes[self][0], &event);
    return epoll;
}

static int wait_epoll(int self)
{
    struct epoll_event event;
    return epoll_wait(epoll_of(self), &event, 1, -1) == 1 ? 0 : -1;
}

static int wait_epoll_pwait(int self)
{
    struct epoll_event event;
    sigset_t none;
    sigemptyset(&none);
    sigaddset(&none, SIGUSR1);
    return epoll_pwait(epoll_of(self), &event, 1, 60000, &none) == 1 ? 0 : -1;
}

static int wait_futex(int self)
{
    (void)self;
    while (!__atomic_load_n(&futex_word, __ATOMIC_SEQ_CST))
        if (syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, NULL, NULL, 0) && errno != EAGAIN)
            return -1;
    return 0;
}

static int wait_read(int self)
{
    char byte;
    return read(pipes[self][0], &byte, 1) == 1 ? 0 : -1;
}

static int wait_accept(int self)
{
    (void)self;
    return accept(listener, NULL, NULL) >= 0 ? 0 : -1;
}

static int wait_recv(int self)
{
    struct timeval timeout = {60, 0};
    char byte;
    (void)self;
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    return recv(pair[0], &byte, 1, 0) == 1 ? 0 : -1;
}

static int wait_sigtimedwait(int self)
{
    struct timespec timeout = {60, 0};
    sigset_t set;
    (void)self;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    return sigtimedwait(&set, NULL, &timeout) == SIGUSR1 ? 0 : -1;
}

static int wait_semop(int self)
{
    struct sembuf down = {0, -1, 0};
    (void)self;
    return semop(semaphores, &down, 1);
}

static int wait_io_getevents(int self)
{
    aio_context_t context = 0;
    struct iocb block, *blocks = &block;
    struct io_event event;
    memset(&block, 0, sizeof block);
    block.aio_lio_opcode = IOCB_CMD_POLL;
    block.aio_fildes = pipes[self][0];
    block.aio_buf = POLLIN;
    if (syscall(SYS_io_setup, 1, &context) || syscall(SYS_io_submit, context, 1, &blocks) != 1)
        return -1;
    return syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1 ? 0 : -1;
}

static int wait_waitpid(int self)
{
    char byte;
    int status;
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        _exit(read(pipes[self][0], &byte, 1) == 1 ? 7 : 1);
    }
    return waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7 ? 0 : -1;
}

static int wait_pause(int self)
{
    (void)self;
    return pause() == -1 && errno == EINTR && handled == 1 ? 0 : -1;
}

static int wait_ppoll(int self)
{
    struct pollfd poll_fd = {pipes[self][0], POLLIN, 0};
    struct timespec timeout = {60, 0};
    sigset_t some;
    sigemptyset(&some);
    sigaddset(&some, SIGUSR1);
    return ppoll(&poll_fd, 1, &timeout, &some) == 1 ? 0 : -1;
}

static int wait_write(int self)
{
    static char full[1 << 20];
    /* A write that has moved some bytes returns their number when it is interrupted; that is not an error. */
    for (size_t left = sizeof full; left;) {
        ssize_t written = write(pipes[self][1], full, left);
        if (written <= 0)
            return -1;
        left -= written;
    }
    return 0;
}

static int (*const waiters[WAITERS])(int) = {
    wait_nanosleep, wait_poll, wait_select, wait_epoll, wait_epoll_pwait, wait_futex, wait_read, wait_accept,
    wait_recv, wait_sigtimedwait, wait_semop, wait_io_getevents, wait_waitpid, wait_pause, wait_ppoll, wait_write,
};

static void *run(void *argument)
{
    long self = (long)argument;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    if (waiters[self] != wait_pause)
        sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    control->state[self] = 1;
    errno = 0;
    int failed = waiters[self](self);
    control->error[self] = errno;
    control->state[self] = failed ? 3 : 2;
    return NULL;
}

static void on_user(int number)
{
    (void)number;
    handled++;
}

int main(int count, char **words)
{
    if (count != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = open(words[1], O_RDWR);
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (int i = 0; i < WAITERS; i++)
        if (pipe(pipes[i]))
            return 2;
    struct sigaction action = {.sa_handler = on_user};
    sigaction(SIGUSR2, &action, NULL);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr unnamed = {.sa_family = AF_UNIX};
    bind(listener, &unnamed, sizeof(sa_family_t));
    listen(listener, 1);
    getsockname(listener, (struct sockaddr *)&address, &address_length);
    semaphores = semget(IPC_PRIVATE, 1, 0600);

    const size_t size = 256 * sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory = (char *)(((uintptr_t)memory + size - 1) / size * size);
    memset(memory, 7, size);
    control->base = (uint64_t)memory;
    control->size = size;
    pthread_t threads[WAITERS];
    for (long i = 0; i < WAITERS; i++)
        pthread_create(&threads[i], NULL, run, (void *)i);
    control->ready = 1;
    while (!control->stop)
        usleep(1000);

    char byte = 1;
    int caller = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sembuf up = {0, 1, 0};
    static char drain[1 << 20];
    for (int i = 0; i < WAITERS; i++)
        if (waiters[i] == wait_sigtimedwait)
            pthread_kill(threads[i], SIGUSR1);
        else if (waiters[i] == wait_pause)
            pthread_kill(threads[i], SIGUSR2);
        else if (waiters[i] == wait_write)
            for (size_t left = sizeof drain; left;)
                left -= read(pipes[i][0], drain, left);
        else if (write(pipes[i][1], &byte, 1) != 1)
            return 3;
    connect(caller, (struct sockaddr *)&address, address_length);
    if (write(pair[1], &byte, 1) != 1)
        return 3;
    semop(semaphores, &up, 1);
    __atomic_store_n(&futex_word, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1, NULL, NULL, 0);
    for (int i = 0; i < WAITERS; i++)
        pthread_join(threads[i], NULL);
    semctl(semaphores, 0, IPC_RMID);
    return 0;
}
