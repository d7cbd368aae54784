/* Runs the stub for aarch64, in an emulator of user programs too, and says what it did.
 *
 * mover_stub_aarch64 CODE park|abandon|work
 *
 * CODE is a file with the stub. There is no tracer here: a signal handler takes a thread's registers for a context and
 * gives it those of a parked one, as a tracer would, so that it goes on in the stub when the handler returns.
 *
 * park     a thread is parked, and the worker is reported as done: the thread restores itself
 * abandon  a thread is parked, and no worker comes: it gives up and restores itself
 * work     a thread is the worker of three blocks. Instead of UFFDIO_MOVE, which emulators lack, there is a break point
 *          whose handler moves the pages, all of them, half of them, or none with an error
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define HEADER_BYTES 256
#define OPERATION_WORDS 16
#define CONTEXT_BYTES 1248
#define C_MASK 168
#define C_REGS 312
#define C_FPSIMD 592
#define C_TICKS 1136
#define W_ALL_SIGNALS 9
#define W_CONTEXTS 22
#define W_THREADS 23
#define W_PASSES 25
#define W_START 31
#define C_KEEPER 1192
#define MAX_PASSES 400
#define W_UFFD 3                /* words of the header */
#define W_MOVE 4
#define W_PREPARED 10
#define W_API 12
#define W_REGISTER 15
#define W_SCRATCH_SIZE 19
#define NR_IOCTL 29
#define NR_USERFAULTFD 282
#define A_DESCRIPTOR 33
#define SVC 0xd4000001u
#define BRK 0xd4200000u
#define BLOCK 65536
#define WRONG(...) (printf(__VA_ARGS__), puts(""), exit(1))

static char *code;
static size_t code_size;
static uint64_t *header, *context;
static char *scratch;
static int is_worker;
static volatile int stop;

static void take(int number, siginfo_t *info, void *argument)
{
    ucontext_t *where = argument;
    (void)number, (void)info;
    memset(context, 0, CONTEXT_BYTES);
    uint64_t *registers = context + C_REGS / 8;
    memcpy(registers, where->uc_mcontext.regs, 31 * 8);
    registers[31] = where->uc_mcontext.sp;
    registers[32] = where->uc_mcontext.pc;
    registers[33] = where->uc_mcontext.pstate;
    memcpy(context + C_MASK / 8, &where->uc_sigmask, 8);
    context[C_FPSIMD / 8] = 0x46508001u | 528ull << 32;
    where->uc_mcontext.regs[28] = (uint64_t)context;
    where->uc_mcontext.regs[27] = (uint64_t)header;
    where->uc_mcontext.pc = (uint64_t)code;
    context[C_KEEPER / 8] = is_worker;
    if (!is_worker)
        sigfillset(&where->uc_sigmask);
}

/* The preparation: whether this call is part of it. */
static int prepare(unsigned long long *registers)
{
    static unsigned stage = 1;
    if (stage == 1 && registers[8] == NR_USERFAULTFD && registers[0] == 0x80001)
        registers[0] = A_DESCRIPTOR;
    else if (registers[0] == A_DESCRIPTOR && ((stage == 2 && registers[1] == 0xc018aa3fu &&
                                               registers[2] == (uint64_t)(header + W_API)) ||
                                              (stage == 3 && registers[1] == 0xc020aa00u &&
                                               registers[2] == (uint64_t)(header + W_REGISTER))))
        registers[0] = 0;
    else
        return 0;
    if (header[W_PREPARED] != ++stage)
        WRONG("stage %lu instead of %u", (unsigned long)header[W_PREPARED], stage);
    return 1;
}

/* The kernel's part of UFFDIO_MOVE. */
static void move(int number, siginfo_t *info, void *argument)
{
    ucontext_t *where = argument;
    uint64_t *request = header + W_MOVE;
    (void)number, (void)info;
    if (prepare(where->uc_mcontext.regs)) {
        where->uc_mcontext.pc += 4;
        return;
    }
    if (header[W_UFFD] != A_DESCRIPTOR || where->uc_mcontext.regs[0] != header[W_UFFD] || where->uc_mcontext.regs[1] != 0xc028aa05u ||
        where->uc_mcontext.regs[2] != (uint64_t)request || request[0] != (uint64_t)scratch)
        WRONG("the request is not the expected one");
    static int asked;
    int64_t moved = (int64_t[]){BLOCK, BLOCK / 2, -EBUSY, -EBUSY}[asked];
    where->uc_mcontext.regs[0] = (int64_t[]){0, -EAGAIN, -EBUSY, -EBUSY}[asked];
    asked++;
    if (moved > 0) {
        memcpy(scratch, (char *)request[1], moved);
        madvise((char *)request[1], moved, MADV_DONTNEED);
        memset((char *)request[1], 0, moved);
    }
    request[4] = moved;
    where->uc_mcontext.pc += 4;
}

static volatile uint64_t rounds, wrong;

/* Registers that it can name are checked all the time, general and vector ones, and the stack. */
static void *spin(void *argument)
{
    uint64_t seed = 0x1234567;
    while (!stop) {
        uint64_t bad;
        __asm__ volatile(
            "mov x19, %[seed]\n add x20, x19, #1\n add x21, x19, #2\n add x22, x19, #3\n add x23, x19, #4\n"
            "add x24, x19, #5\n add x25, x19, #6\n add x26, x19, #7\n add x27, x19, #8\n add x28, x19, #9\n"
            "mov x16, x19\n mov x17, x20\n mov x18, x21\n fmov d8, x19\n fmov d31, x20\n fmov d0, x21\n"
            "mov x9, #20000\n"
            "1: subs x9, x9, #1\n b.ne 1b\n"
            "fmov x10, d8\n sub %[bad], x10, x19\n fmov x10, d31\n sub x10, x10, x20\n orr %[bad], %[bad], x10\n"
            "fmov x10, d0\n sub x10, x10, x21\n orr %[bad], %[bad], x10\n"
            "sub x10, x28, x19\n sub x10, x10, #9\n orr %[bad], %[bad], x10\n"
            "sub x10, x27, x19\n sub x10, x10, #8\n orr %[bad], %[bad], x10\n"
            "sub x10, x16, x19\n orr %[bad], %[bad], x10\n sub x10, x17, x20\n orr %[bad], %[bad], x10\n"
            "sub x10, x19, %[seed]\n orr %[bad], %[bad], x10\n"
            : [bad] "=&r"(bad)
            : [seed] "r"(seed)
            : "x9", "x10", "x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28",
              "d0", "d8", "d31", "cc", "memory");
        wrong |= bad;
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        rounds++;
    }
    return argument;
}

static void *do_work(void *argument)
{
    raise(SIGUSR1);
    return argument;
}

static void nap(int milliseconds)
{
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static int gets_on(void)
{
    uint64_t before = rounds;
    for (int i = 0; i < 500 && rounds < before + 3; i++)
        nap(10);
    return rounds >= before + 3;
}

static void park(int abandon)
{
    pthread_t thread;
    pthread_create(&thread, NULL, spin, NULL);
    if (!gets_on())
        WRONG("the thread does not run at first");
    pthread_kill(thread, SIGUSR1);
    nap(200);
    uint64_t before = rounds;
    nap(100);
    if (rounds != before)
        WRONG("the thread is not parked");
    if (!abandon)
        __atomic_store_n((uint32_t *)header, 2, __ATOMIC_SEQ_CST);
    if (!gets_on())
        WRONG("the thread did not restore itself");
    if (*(uint32_t *)header != (abandon ? 3 : 2) || (abandon && context[C_TICKS / 8] != 100))
        WRONG("state %u after %lu ticks", *(uint32_t *)header, (unsigned long)context[C_TICKS / 8]);
    sigset_t set;
    sigemptyset(&set);
    pthread_kill(thread, SIGUSR2);
    nap(100);
    stop = 1;
    pthread_join(thread, NULL);
    if (wrong)
        WRONG("a register was not restored");
}

static uint64_t hash(const uint64_t *words)
{
    uint64_t factor = 0x9e3779b97f4a7c15u, value = factor;
    for (int i = 0; i < BLOCK / 8; i++) {
        value = (value ^ words[i]) * factor;
        value = value << 29 | value >> 35;
    }
    return value;
}

static void work(void)
{
    char *memory = mmap(NULL, 3 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *copy = malloc(3 * BLOCK);
    for (int i = 0; i < 3 * BLOCK; i++)
        copy[i] = memory[i] = i * 7 + i / 4096 * 3 + 1;
    int number = 0;
    for (uint32_t *word = (uint32_t *)code; (char *)word < code + code_size; word++) {
        if ((*word & 0xffe0001fu) == 0xd2800008u) /* mov x8, #number */
            number = *word >> 5 & 0xffff;
        if (*word == SVC && (number == NR_IOCTL || number == NR_USERFAULTFD))
            *word = BRK;
    }
    __builtin___clear_cache(code, code + code_size);
    header[1] = 3;
    header[W_SCRATCH_SIZE] = BLOCK;
    for (int i = 0; i < 3; i++) {
        uint64_t *operation = header + HEADER_BYTES / 8 + i * OPERATION_WORDS;
        operation[0] = (uint64_t)memory + i * BLOCK;
        operation[1] = BLOCK;
        operation[2] = 1;
        operation[3] = 1;
    }
    pthread_t thread;
    is_worker = 1;
    header[W_START] = 1;
    header[W_ALL_SIGNALS] = ~(1ull << (SIGTRAP - 1)); /* that of the break point */
    /* It waits for a tracer, and then for other threads, of which there are none; it has waited long enough. */
    header[W_CONTEXTS] = (uint64_t)context;
    header[W_THREADS] = 1;
    header[W_PASSES] = MAX_PASSES;
    pthread_create(&thread, NULL, do_work, NULL);
    pthread_join(thread, NULL);
    if (*(uint32_t *)header != 2)
        WRONG("the worker is not done");
    if (memcmp(memory, copy, 3 * BLOCK))
        WRONG("the bytes are not what they were");
    int64_t errors[] = {0, -EAGAIN, -EBUSY}, moved[] = {BLOCK, BLOCK / 2, 0};
    for (int i = 0; i < 3; i++) {
        int64_t *operation = (int64_t *)header + HEADER_BYTES / 8 + i * OPERATION_WORDS;
        if (operation[3] != errors[i] || operation[4] != moved[i])
            WRONG("operation %d: error %ld, moved %ld", i, (long)operation[3], (long)operation[4]);
        uint64_t expected = hash((uint64_t *)(copy + i * BLOCK));
        if ((uint64_t)operation[5] != expected || (uint64_t)operation[6] != expected)
            WRONG("operation %d: the hash is wrong", i);
        if (operation[7] != (i == 2) || !operation[8] || !operation[14])
            WRONG("operation %d: populated %ld", i, (long)operation[7]);
    }
}

static void nothing(int number) { (void)number; }

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    FILE *file = fopen(words[1], "r");
    code = mmap(NULL, 65536, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    code_size = fread(code, 1, 65536, file);
    __builtin___clear_cache(code, code + code_size);
    header = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    context = header + 32768 / 8;
    scratch = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    header[2] = (uint64_t)scratch;
    header[3] = 77;
    header[9] = ~0ull;
    struct sigaction action = {.sa_sigaction = take, .sa_flags = SA_SIGINFO};
    sigaction(SIGUSR1, &action, NULL);
    action.sa_sigaction = move;
    sigaction(SIGTRAP, &action, NULL);
    signal(SIGUSR2, nothing);
    if (!strcmp(words[2], "work"))
        work();
    else
        park(!strcmp(words[2], "abandon"));
    puts("right");
    return 0;
}
