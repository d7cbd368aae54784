/* The code inside a stopped target: the parking loop of every thread, and the worker.
 *
 * The bytes in x86_64.py are this file, assembled; a test compares the two. park.py and inject.py have the reasons
 * for its structure. Rules for every line: it touches no byte of the target's stacks, uses no vector or FPU register, makes
 * no system call that replaces the thread's restart_block (nanosleep(2) would), has neither a call nor a return (shadow
 * stacks), and reads nothing from an address that may be missing.
 *
 * rbx  the thread's context, rbp  the shared header; both are set by the tracer.
 */

/* header */
#define STATE          0
#define COUNT          8
#define SCRATCH        16
#define UFFD           24       /* -1 without one */
#define MOVE_DST       32       /* struct uffdio_move */
#define MOVE_SRC       40
#define MOVE_LEN       48
#define MOVE_MODE      56
#define MOVE_MOVED     64
#define ALL_SIGNALS    72       /* a signal set with every bit set */
#define PREPARED       80       /* the last stage begun, and its error */
#define ERROR          88
#define API            96       /* struct uffdio_api */
#define REGISTER       120      /* struct uffdio_register */
#define SCRATCH_SIZE   152
#define BASE           160      /* start of the executable part */
#define CODE_END       168
#define CONTEXTS       176
#define THREADS        184
#define UNMAP          192      /* code outside the mapping that unmaps it */
#define PASSES         200
#define GOOD           208
#define NOW            216      /* struct timespec */
#define MAPPED         232      /* 1 once this mapping exists, and once it is written; see boot_x86_64.S */
#define WRITTEN        240
#define START          248      /* permission of the tracer to the worker: 1 to work, 2 to unmap everything */
#define OPS            256

/* states */
#define SETUP          0
#define GO             1
#define DONE           2
#define ABORT          3

/* one block to move */
#define OP_ADDRESS     0
#define OP_LENGTH      8
#define OP_FLAGS       16
#define OP_ERROR       24
#define OP_MOVED       32
#define OP_HASH_BEFORE 40
#define OP_HASH_AFTER  48
#define OP_POPULATED   56
#define OP_BEGUN       64       /* struct timespec, all four */
#define OP_AWAY        80
#define OP_COPIED      96
#define OP_ENDED       112
#define OP_SIZE        128
#define FLAG_VERIFY    1
#define FLAG_FILL      2

/* a thread's context */
#define C_RIP          0
#define C_RSP          8
#define C_FLAGS        16
#define C_RAX          24
#define C_RBX          32
#define C_RCX          40
#define C_RDX          48
#define C_RSI          56
#define C_RDI          64
#define C_RBP          72
#define C_R8           80
#define C_R9           88
#define C_R10          96
#define C_R11          104
#define C_R12          112
#define C_R13          120
#define C_R14          128
#define C_R15          136
#define C_MASK         144
#define C_TICKS        152
#define C_NAP          160      /* struct timespec */
#define C_TRAMPOLINE   176
#define C_HERE         184      /* 1 once the thread runs here, and once it has its signal mask again */
#define C_LEFT         192
#define C_CLOCK        200      /* the clock of its processor time, and its first value */
#define C_USED         208
#define C_KEEPER       216      /* 1 for the thread that finally unmaps everything */
#define C_PATH         224      /* /proc/self/task/TID/syscall */
#define C_SIZE         384      /* its end is the top of a stack of 64 bytes */

#define NR_READ           0
#define NR_CLOSE          3
#define NR_RT_SIGPROCMASK 14
#define NR_IOCTL          16
#define NR_MADVISE        28
#define NR_CLOCK_GETTIME  228
#define NR_OPENAT         257
#define NR_PPOLL          271
#define NR_USERFAULTFD    323

#define SIG_SETMASK          2
#define CLOCK_MONOTONIC      1
#define MADV_DONTNEED        4
#define MADV_POPULATE_READ   22
#define MADV_POPULATE_WRITE  23
#define UFFDIO_API           0xc018aa3f
#define UFFDIO_REGISTER      0xc020aa00
#define UFFDIO_MOVE          0xc028aa05
#define UFFD_FLAGS           0x80001    /* O_CLOEXEC | UFFD_USER_MODE_ONLY */
#define AT_FDCWD             -100
#define O_CLOEXEC            0x80000
#define EBUSY                16

/* stages of the preparation */
#define EMPTY          1        /* scratch memory must be empty: locked memory cannot be emptied */
#define CREATE         2
#define HANDSHAKE      3
#define ARM            4

#define WORK           1
#define UNMAP_ALL      2

#define SPINS         20000     /* polls of START by the worker between two naps, about half a millisecond */
#define TICK_NS       5000000   /* a nap while the tracer sets up */
#define TICKS         100       /* number of naps until the tracer counts as dead */
#define WAIT_NS       200000    /* a nap while the worker works */
#define GRACE_NS      500000    /* a nap of a worker that is done */
#define GRACES        100       /* number of naps until the tracer counts as dead */
#define KEEP_NS       5000000   /* a nap of the keeper */
#define MAX_PASSES    400       /* number of passes after which the mapping stays */
#define GOOD_PASSES   3         /* passes in a row that find all threads outside; a handler may run in between */
#define CPU_NS        50000000  /* processor time after which a thread has left; leaving takes a microsecond */

.macro signal_mask where
        mov     $NR_RT_SIGPROCMASK, %eax
        mov     $SIG_SETMASK, %edi
        lea     \where, %rsi
        mov     $0, %edx
        mov     $8, %r10d
        syscall
.endm

.macro nap nanoseconds
        movq    $0, C_NAP(%rbx)
        movq    $\nanoseconds, C_NAP+8(%rbx)
        mov     $NR_PPOLL, %eax
        xor     %edi, %edi
        xor     %esi, %esi
        lea     C_NAP(%rbx), %rdx
        xor     %r10d, %r10d
        mov     $8, %r8d
        syscall
.endm

.macro stamp offset
        mov     $NR_CLOCK_GETTIME, %eax
        mov     $CLOCK_MONOTONIC, %edi
        lea     \offset(%r13), %rsi
        syscall
.endm

.macro prepare stage
        movq    $\stage, PREPARED(%rbp)
        syscall
        test    %rax, %rax
        js      not_prepared
.endm

.macro advise_block advice
        mov     $NR_MADVISE, %eax
        mov     OP_ADDRESS(%r13), %rdi
        mov     OP_LENGTH(%r13), %rsi
        mov     $\advice, %edx
        syscall
.endm

/* A hash of the block's words in order; every change of one word changes it. */
.macro hash_block result
        mov     OP_ADDRESS(%r13), %rsi
        mov     OP_LENGTH(%r13), %rcx
        movabs  $0x9e3779b97f4a7c15, %rdx
        mov     %rdx, %rax
80:     xor     (%rsi), %rax
        imul    %rdx, %rax
        rol     $29, %rax
        add     $8, %rsi
        sub     $8, %rcx
        jnz     80b
        mov     %rax, \result(%r13)
.endm

        .text
entry_park:                                     /* offset 0 */
        movq    $1, C_HERE(%rbx)
        signal_mask ALL_SIGNALS(%rbp)           /* in case the tracer died before it did so */
park:
        mov     STATE(%rbp), %ecx
        cmp     $DONE, %ecx
        jae     leave
        cmp     $SETUP, %ecx
        jne     working
        cmpq    $0, C_KEEPER(%rbx)
        je      2f
        mov     $SPINS, %r14d
1:      cmpq    $WORK, START(%rbp)
        je      worker
        pause
        dec     %r14d
        jnz     1b
2:      incq    C_TICKS(%rbx)
        cmpq    $TICKS, C_TICKS(%rbx)
        jae     give_up
        nap     TICK_NS
        jmp     park
working:
        nap     WAIT_NS
        jmp     park
give_up:
        mov     $SETUP, %eax
        mov     $ABORT, %ecx
        lock cmpxchg %ecx, STATE(%rbp)
        jmp     park

leave:
        cmpq    $0, C_KEEPER(%rbx)
        jne     keeper
restore:
        lea     C_SIZE(%rbx), %rsp
        pushq   C_FLAGS(%rbx)
        popfq                                   /* no instruction below changes flags */
        mov     C_RSP(%rbx), %rsp
        signal_mask C_MASK(%rbx)                /* a handler may run here, on the thread's own stack */
        mov     C_RAX(%rbx), %rax
        mov     C_RCX(%rbx), %rcx
        mov     C_RDX(%rbx), %rdx
        mov     C_RSI(%rbx), %rsi
        mov     C_RDI(%rbx), %rdi
        mov     C_RBP(%rbx), %rbp
        mov     C_R8(%rbx), %r8
        mov     C_R9(%rbx), %r9
        mov     C_R10(%rbx), %r10
        mov     C_R11(%rbx), %r11
        mov     C_R12(%rbx), %r12
        mov     C_R13(%rbx), %r13
        mov     C_R14(%rbx), %r14
        mov     C_R15(%rbx), %r15
        movq    $1, C_LEFT(%rbx)
        jmp     *C_TRAMPOLINE(%rbx)             /* which restores rbx, rsp and rip without a register */

worker:
        mov     $SETUP, %eax
        mov     $GO, %ecx
        lock cmpxchg %ecx, STATE(%rbp)
        jne     park

        /* The userfaultfd exists from here to `done`, while no other thread runs: no child can inherit it. */
        mov     $NR_MADVISE, %eax
        mov     SCRATCH(%rbp), %rdi
        mov     SCRATCH_SIZE(%rbp), %rsi
        mov     $MADV_DONTNEED, %edx
        prepare EMPTY
        mov     $NR_USERFAULTFD, %eax
        mov     $UFFD_FLAGS, %edi
        prepare CREATE
        mov     %rax, UFFD(%rbp)
        mov     $NR_IOCTL, %eax
        mov     UFFD(%rbp), %rdi
        mov     $UFFDIO_API, %esi
        lea     API(%rbp), %rdx
        prepare HANDSHAKE
        mov     $NR_IOCTL, %eax
        mov     UFFD(%rbp), %rdi
        mov     $UFFDIO_REGISTER, %esi
        lea     REGISTER(%rbp), %rdx
        prepare ARM

        xor     %r12d, %r12d
        lea     OPS(%rbp), %r13
next_block:
        cmp     COUNT(%rbp), %r12
        jae     done
        stamp   OP_BEGUN
        testq   $FLAG_FILL, OP_FLAGS(%r13)
        jz      1f
        advise_block MADV_POPULATE_WRITE
        mov     %rax, OP_ERROR(%r13)
        test    %rax, %rax
        jnz     block_ended
1:      testq   $FLAG_VERIFY, OP_FLAGS(%r13)
        jz      move_away
        advise_block MADV_POPULATE_READ         /* an error here prevents a SIGSEGV below */
        mov     %rax, OP_ERROR(%r13)
        test    %rax, %rax
        jnz     block_ended
        hash_block OP_HASH_BEFORE

move_away:
        mov     SCRATCH(%rbp), %r14
        mov     %r14, MOVE_DST(%rbp)
        mov     OP_ADDRESS(%r13), %rax
        mov     %rax, MOVE_SRC(%rbp)
        mov     OP_LENGTH(%r13), %rax
        mov     %rax, MOVE_LEN(%rbp)
        movq    $0, MOVE_MODE(%rbp)
        movq    $0, MOVE_MOVED(%rbp)
        mov     $NR_IOCTL, %eax
        mov     UFFD(%rbp), %rdi
        mov     $UFFDIO_MOVE, %esi
        lea     MOVE_DST(%rbp), %rdx
        syscall
        mov     %rax, OP_ERROR(%r13)
        stamp   OP_AWAY
        mov     MOVE_MOVED(%rbp), %rcx          /* bytes, or a negative errno */
        cmp     $0, %rcx
        jle     nothing_moved
        mov     %rcx, OP_MOVED(%r13)
        mov     OP_ADDRESS(%r13), %rdi
        mov     %r14, %rsi
        shr     $3, %rcx
        cld
        rep movsq                               /* the first store faults the new folio in */
        stamp   OP_COPIED
        mov     $NR_MADVISE, %eax
        mov     %r14, %rdi
        mov     OP_MOVED(%r13), %rsi
        mov     $MADV_DONTNEED, %edx
        syscall
nothing_moved:
        cmpq    $-EBUSY, OP_ERROR(%r13)
        jne     moved
        cmpq    $0, OP_POPULATED(%r13)
        jne     moved
        movq    $1, OP_POPULATED(%r13)
        advise_block MADV_POPULATE_WRITE        /* pages write-protected by a fork become exclusive again */
        test    %rax, %rax
        jz      move_away
moved:
        testq   $FLAG_VERIFY, OP_FLAGS(%r13)
        jz      block_ended
        hash_block OP_HASH_AFTER
block_ended:
        stamp   OP_ENDED
        inc     %r12
        add     $OP_SIZE, %r13
        jmp     next_block

not_prepared:
        mov     %rax, ERROR(%rbp)
done:
        mov     UFFD(%rbp), %rdi
        test    %rdi, %rdi
        js      1f
        mov     $NR_CLOSE, %eax
        syscall
1:      movl    $DONE, STATE(%rbp)
        mov     $GRACES, %r12d
2:      mov     $SPINS, %r14d
3:      cmpq    $UNMAP_ALL, START(%rbp)
        je      unmap
        pause
        dec     %r14d
        jnz     3b
        nap     GRACE_NS
        dec     %r12d
        jnz     2b
        jmp     park
unmap:
        jmp     *UNMAP(%rbp)

/* The tracer is dead: wait until no other thread can need this mapping, and have it unmapped by code outside of it.
 * A thread is outside if it is gone, sleeps at an address outside, or has used more processor time than leaving takes.
 */
keeper:
        mov     CONTEXTS(%rbp), %r13
        mov     THREADS(%rbp), %r14
        xor     %r15d, %r15d
next_thread:
        cmp     %rbx, %r13
        je      outside
        mov     C_HERE(%r13), %rax
        cmp     C_LEFT(%r13), %rax
        jne     inside
        mov     $NR_CLOCK_GETTIME, %eax
        mov     C_CLOCK(%r13), %rdi
        lea     NOW(%rbp), %rsi
        syscall
        test    %rax, %rax
        jnz     outside                         /* it is gone */
        imul    $1000000000, NOW(%rbp), %rax
        add     NOW+8(%rbp), %rax
        mov     C_USED(%r13), %rcx
        test    %rcx, %rcx
        jnz     1f
        inc     %rax
        mov     %rax, C_USED(%r13)
        jmp     2f
1:      add     $CPU_NS, %rcx
        cmp     %rcx, %rax
        ja      outside
2:      mov     $NR_OPENAT, %eax
        mov     $AT_FDCWD, %rdi
        lea     C_PATH(%r13), %rsi
        mov     $O_CLOEXEC, %edx
        syscall
        test    %rax, %rax
        js      inside
        mov     %rax, %r12
        mov     $NR_READ, %eax
        mov     %r12, %rdi
        mov     SCRATCH(%rbp), %rsi
        mov     $256, %edx
        syscall
        mov     %rax, %r9
        mov     $NR_CLOSE, %eax
        mov     %r12, %rdi
        syscall
        cmp     $2, %r9
        jl      inside
        mov     SCRATCH(%rbp), %rsi
        cmpb    $'r', (%rsi)                    /* "running" */
        je      inside
        lea     -1(%rsi,%r9), %rdi              /* the line ends with the program counter in hexadecimal */
3:      dec     %rdi
        cmp     %rsi, %rdi
        jbe     inside
        cmpb    $'x', (%rdi)
        jne     3b
        xor     %eax, %eax
4:      inc     %rdi
        movzbl  (%rdi), %ecx
        cmp     $10, %ecx
        je      5f
        mov     %ecx, %edx
        shr     $6, %edx                        /* 1 for a letter */
        lea     (%rdx,%rdx,8), %edx
        and     $15, %ecx
        add     %edx, %ecx
        shl     $4, %rax
        add     %rcx, %rax
        jmp     4b
5:      cmp     BASE(%rbp), %rax
        jb      outside
        cmp     CODE_END(%rbp), %rax
        jae     outside
        movq    $0, PASSES(%rbp)                /* inside, asleep: a tracer that is itself stopped may hold it */
inside:
        inc     %r15d
outside:
        add     $C_SIZE, %r13
        dec     %r14
        jnz     next_thread
        incq    PASSES(%rbp)
        incq    GOOD(%rbp)
        test    %r15d, %r15d
        jz      6f
        movq    $0, GOOD(%rbp)
6:      cmpq    $GOOD_PASSES, GOOD(%rbp)
        jae     unmap
        cmpq    $UNMAP_ALL, START(%rbp)         /* the tracer lives after all, and has restored the others */
        je      unmap
        cmpq    $MAX_PASSES, PASSES(%rbp)
        jae     restore
        nap     KEEP_NS
        jmp     keeper
