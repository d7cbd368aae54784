/* The code inside a stopped target: the parking loop of every thread, and the worker. For aarch64.
 *
 * It does the same as stub_x86_64.S, with the same header and operations; the bytes in aarch64.py are this file,
 * assembled, and a test compares the two. The rules are the same: it touches no byte of the target's stacks, has no
 * call and no return, and reads nothing from an address that may be missing. Differences:
 *
 * No thread can restore its last register and branch without a register, so a thread leaves with rt_sigreturn(2), which
 * sets all registers and the signal mask at once. Its context begins with the frame that this call reads
 * (struct rt_sigframe, arch/arm64/kernel/signal.c; records in asm/sigcontext.h). The vector registers, which nothing
 * here touches, are written into the frame just before.
 *
 * x28  the thread's context, x27  the shared header; both are set by the tracer.
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
#define MAPPED         232      /* 1 once this mapping exists, and once it is written; see boot_aarch64.S */
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

/* a thread's context: the frame, then words of the mover */
#define C_MASK         168
#define C_REGS         312
#define C_SP           560
#define C_PC           568
#define C_PSTATE       576
#define C_FPSIMD       592      /* struct fpsimd_context */
#define C_FPSR         600
#define C_FPCR         604
#define C_VREGS        608
#define C_END          1120     /* the empty record that ends the frame */
#define C_TICKS        1136
#define C_NAP          1144     /* struct timespec */
#define C_HERE         1160     /* 1 once the thread runs here, and once it leaves */
#define C_LEFT         1168
#define C_CLOCK        1176     /* the clock of its processor time, and its first value */
#define C_USED         1184
#define C_KEEPER       1192     /* 1 for the thread that finally unmaps everything */
#define C_PATH         1200     /* /proc/self/task/TID/syscall */
#define C_SIZE         1248

#define NR_IOCTL          29
#define NR_OPENAT         56
#define NR_CLOSE          57
#define NR_READ           63
#define NR_PPOLL          73
#define NR_CLOCK_GETTIME  113
#define NR_RT_SIGPROCMASK 135
#define NR_RT_SIGRETURN   139
#define NR_MADVISE        233
#define NR_USERFAULTFD    282

#define SIG_SETMASK          2
#define CLOCK_MONOTONIC      1
#define MADV_DONTNEED        4
#define MADV_POPULATE_READ   22
#define MADV_POPULATE_WRITE  23
#define EBUSY                16
#define UFFD_USER_MODE_ONLY  1
#define O_CLOEXEC            0x80000
#define AT_FDCWD             -100

/* stages of the preparation */
#define EMPTY          1        /* scratch memory must be empty: locked memory cannot be emptied */
#define CREATE         2
#define HANDSHAKE      3
#define ARM            4

#define WORK           1
#define UNMAP_ALL      2

#define SPINS         20000     /* polls of START by the worker between two naps */
#define TICK_NS       5000000   /* a nap while the tracer sets up */
#define TICKS         100       /* number of naps until the tracer counts as dead */
#define WAIT_NS       200000    /* a nap while the worker works */
#define GRACE_NS      500000    /* a nap of a worker that is done */
#define GRACES        100       /* number of naps until the tracer counts as dead */
#define KEEP_NS       5000000   /* a nap of the keeper */
#define MAX_PASSES    400       /* number of passes after which the mapping stays */
#define GOOD_PASSES   3         /* passes in a row that find all threads outside; a handler may run in between */
#define CPU_NS        50000000  /* processor time after which a thread has left; leaving takes a microsecond */

.macro nap nanoseconds
        movz    x9, #(\nanoseconds & 0xffff)
        movk    x9, #(\nanoseconds >> 16), lsl #16
        add     x2, x28, #C_NAP
        stp     xzr, x9, [x2]
        mov     x0, #0
        mov     x1, #0
        mov     x3, #0
        mov     x4, #8
        mov     x8, #NR_PPOLL
        svc     #0
.endm

.macro stamp offset
        mov     x0, #CLOCK_MONOTONIC
        add     x1, x20, #\offset
        mov     x8, #NR_CLOCK_GETTIME
        svc     #0
.endm

.macro prepare stage
        mov     x9, #\stage
        str     x9, [x27, #PREPARED]
        svc     #0
        tbnz    x0, #63, not_prepared
.endm

.macro number register, value
        movz    \register, #(\value & 0xffff)
        movk    \register, #(\value >> 16), lsl #16
.endm

.macro advise_block advice
        ldp     x0, x1, [x20, #OP_ADDRESS]
        mov     x2, #\advice
        mov     x8, #NR_MADVISE
        svc     #0
.endm

/* A hash of the block's words in order; every change of one word changes it. */
.macro hash_block result
        ldp     x9, x10, [x20, #OP_ADDRESS]
        movz    x11, #0x7c15
        movk    x11, #0x7f4a, lsl #16
        movk    x11, #0x79b9, lsl #32
        movk    x11, #0x9e37, lsl #48
        mov     x12, x11
80:     ldr     x13, [x9], #8
        eor     x12, x12, x13
        mul     x12, x12, x11
        ror     x12, x12, #35
        subs    x10, x10, #8
        b.ne    80b
        str     x12, [x20, #\result]
.endm

        .text
entry_park:                                     /* offset 0 */
        mov     x9, #1
        str     x9, [x28, #C_HERE]
        mov     x0, #SIG_SETMASK                /* in case the tracer died before it did so */
        add     x1, x27, #ALL_SIGNALS
        mov     x2, #0
        mov     x3, #8
        mov     x8, #NR_RT_SIGPROCMASK
        svc     #0
park:
        ldar    w9, [x27]
        cmp     w9, #DONE
        b.hs    leave
        cbnz    w9, working
        ldr     x9, [x28, #C_KEEPER]
        cbz     x9, 2f
        mov     x23, #SPINS
1:      add     x9, x27, #START
        ldar    x9, [x9]
        cmp     x9, #WORK
        b.eq    worker
        yield
        subs    x23, x23, #1
        b.ne    1b
2:      ldr     x10, [x28, #C_TICKS]
        add     x10, x10, #1
        str     x10, [x28, #C_TICKS]
        cmp     x10, #TICKS
        b.hs    give_up
        nap     TICK_NS
        b       park
working:
        nap     WAIT_NS
        b       park
give_up:
        mov     w10, #ABORT
1:      ldaxr   w9, [x27]
        cbnz    w9, park
        stlxr   w11, w10, [x27]
        cbnz    w11, 1b
        b       park

leave:
        ldr     x9, [x28, #C_KEEPER]
        cbnz    x9, keeper
restore:
        mov     x9, #1
        str     x9, [x28, #C_LEFT]
        add     x9, x28, #C_VREGS
        stp     q0, q1, [x9]
        stp     q2, q3, [x9, #32]
        stp     q4, q5, [x9, #64]
        stp     q6, q7, [x9, #96]
        stp     q8, q9, [x9, #128]
        stp     q10, q11, [x9, #160]
        stp     q12, q13, [x9, #192]
        stp     q14, q15, [x9, #224]
        stp     q16, q17, [x9, #256]
        stp     q18, q19, [x9, #288]
        stp     q20, q21, [x9, #320]
        stp     q22, q23, [x9, #352]
        stp     q24, q25, [x9, #384]
        stp     q26, q27, [x9, #416]
        stp     q28, q29, [x9, #448]
        stp     q30, q31, [x9, #480]
        mrs     x10, fpsr
        str     w10, [x28, #C_FPSR]
        mrs     x10, fpcr
        str     w10, [x28, #C_FPCR]
        mov     sp, x28
        mov     x8, #NR_RT_SIGRETURN
        svc     #0                              /* does not come back */

worker:
        mov     w10, #GO
1:      ldaxr   w9, [x27]
        cbnz    w9, park
        stlxr   w11, w10, [x27]
        cbnz    w11, 1b

        /* The userfaultfd exists from here to `done`, while no other thread runs: no child can inherit it. */
        ldr     x0, [x27, #SCRATCH]
        ldr     x1, [x27, #SCRATCH_SIZE]
        mov     x2, #MADV_DONTNEED
        mov     x8, #NR_MADVISE
        prepare EMPTY
        number  x0, (O_CLOEXEC | UFFD_USER_MODE_ONLY)
        mov     x8, #NR_USERFAULTFD
        prepare CREATE
        str     x0, [x27, #UFFD]
        number  x1, 0xc018aa3f                  /* UFFDIO_API */
        add     x2, x27, #API
        mov     x8, #NR_IOCTL
        prepare HANDSHAKE
        ldr     x0, [x27, #UFFD]
        number  x1, 0xc020aa00                  /* UFFDIO_REGISTER */
        add     x2, x27, #REGISTER
        mov     x8, #NR_IOCTL
        prepare ARM

        mov     x19, #0
        add     x20, x27, #OPS
next_block:
        ldr     x9, [x27, #COUNT]
        cmp     x19, x9
        b.hs    done
        stamp   OP_BEGUN
        ldr     x23, [x20, #OP_FLAGS]
        tbz     x23, #1, 1f                     /* FLAG_FILL */
        advise_block MADV_POPULATE_WRITE
        str     x0, [x20, #OP_ERROR]
        cbnz    x0, block_ended
1:      tbz     x23, #0, move_away              /* FLAG_VERIFY */
        advise_block MADV_POPULATE_READ         /* an error here prevents a SIGSEGV below */
        str     x0, [x20, #OP_ERROR]
        cbnz    x0, block_ended
        hash_block OP_HASH_BEFORE

move_away:
        ldr     x21, [x27, #SCRATCH]
        ldp     x9, x10, [x20, #OP_ADDRESS]
        stp     x21, x9, [x27, #MOVE_DST]
        stp     x10, xzr, [x27, #MOVE_LEN]
        str     xzr, [x27, #MOVE_MOVED]
        ldr     x0, [x27, #UFFD]
        movz    x1, #0xaa05                     /* UFFDIO_MOVE */
        movk    x1, #0xc028, lsl #16
        add     x2, x27, #MOVE_DST
        mov     x8, #NR_IOCTL
        svc     #0
        str     x0, [x20, #OP_ERROR]
        stamp   OP_AWAY
        ldr     x22, [x27, #MOVE_MOVED]         /* bytes, or a negative errno */
        cmp     x22, #0
        b.le    nothing_moved
        str     x22, [x20, #OP_MOVED]
        ldr     x9, [x20, #OP_ADDRESS]
        mov     x10, x21
        mov     x11, x22
2:      ldp     x12, x13, [x10], #16
        ldp     x14, x15, [x10], #16
        stp     x12, x13, [x9], #16             /* the first store faults the new folio in */
        stp     x14, x15, [x9], #16
        subs    x11, x11, #32
        b.ne    2b
        stamp   OP_COPIED
        mov     x0, x21
        mov     x1, x22
        mov     x2, #MADV_DONTNEED
        mov     x8, #NR_MADVISE
        svc     #0
nothing_moved:
        ldr     x9, [x20, #OP_ERROR]
        cmn     x9, #EBUSY
        b.ne    moved
        ldr     x9, [x20, #OP_POPULATED]
        cbnz    x9, moved
        mov     x9, #1
        str     x9, [x20, #OP_POPULATED]
        advise_block MADV_POPULATE_WRITE        /* pages write-protected by a fork become exclusive again */
        cbz     x0, move_away
moved:
        tbz     x23, #0, block_ended
        hash_block OP_HASH_AFTER
block_ended:
        stamp   OP_ENDED
        add     x19, x19, #1
        add     x20, x20, #OP_SIZE
        b       next_block

not_prepared:
        str     x0, [x27, #ERROR]
done:
        ldr     x0, [x27, #UFFD]
        tbnz    x0, #63, 1f
        mov     x8, #NR_CLOSE
        svc     #0
1:      mov     w9, #DONE
        stlr    w9, [x27]
        mov     x19, #GRACES
2:      mov     x23, #SPINS
3:      add     x9, x27, #START
        ldar    x9, [x9]
        cmp     x9, #UNMAP_ALL
        b.eq    unmap
        yield
        subs    x23, x23, #1
        b.ne    3b
        nap     GRACE_NS
        subs    x19, x19, #1
        b.ne    2b
        b       park
unmap:
        ldr     x16, [x27, #UNMAP]
        br      x16

/* The tracer is dead: wait until no other thread can need this mapping, and have it unmapped by code outside of it.
 * A thread is outside if it is gone, sleeps at an address outside, or has used more processor time than leaving takes.
 */
keeper:
        ldr     x20, [x27, #CONTEXTS]
        ldr     x21, [x27, #THREADS]
        mov     x22, #0
next_thread:
        cmp     x20, x28
        b.eq    outside
        ldr     x9, [x20, #C_HERE]
        ldr     x10, [x20, #C_LEFT]
        cmp     x9, x10
        b.ne    inside
        ldr     x0, [x20, #C_CLOCK]
        add     x1, x27, #NOW
        mov     x8, #NR_CLOCK_GETTIME
        svc     #0
        cbnz    x0, outside                     /* it is gone */
        ldp     x9, x10, [x27, #NOW]
        number  x11, 1000000000
        madd    x9, x9, x11, x10
        ldr     x12, [x20, #C_USED]
        cbnz    x12, 1f
        add     x9, x9, #1
        str     x9, [x20, #C_USED]
        b       2f
1:      number  x11, CPU_NS
        add     x12, x12, x11
        cmp     x9, x12
        b.hi    outside
2:      mov     x0, #AT_FDCWD
        add     x1, x20, #C_PATH
        mov     x2, #O_CLOEXEC
        mov     x3, #0
        mov     x8, #NR_OPENAT
        svc     #0
        tbnz    x0, #63, inside
        mov     x23, x0
        ldr     x1, [x27, #SCRATCH]
        mov     x2, #256
        mov     x8, #NR_READ
        svc     #0
        mov     x24, x0
        mov     x0, x23
        mov     x8, #NR_CLOSE
        svc     #0
        cmp     x24, #2
        b.lt    inside
        ldr     x9, [x27, #SCRATCH]
        ldrb    w10, [x9]
        cmp     w10, #'r'                       /* "running" */
        b.eq    inside
        add     x11, x9, x24                    /* the line ends with the program counter in hexadecimal */
        sub     x11, x11, #1
3:      sub     x11, x11, #1
        cmp     x11, x9
        b.ls    inside
        ldrb    w10, [x11]
        cmp     w10, #'x'
        b.ne    3b
        mov     x12, #0
4:      ldrb    w10, [x11, #1]!
        cmp     w10, #10
        b.eq    5f
        lsr     w13, w10, #6                    /* 1 for a letter */
        add     w13, w13, w13, lsl #3
        and     w10, w10, #15
        add     w10, w10, w13
        add     x12, x10, x12, lsl #4
        b       4b
5:      ldr     x9, [x27, #BASE]
        cmp     x12, x9
        b.lo    outside
        ldr     x9, [x27, #CODE_END]
        cmp     x12, x9
        b.hs    outside
        str     xzr, [x27, #PASSES]             /* inside, asleep: a tracer that is itself stopped may hold it */
inside:
        add     x22, x22, #1
outside:
        add     x20, x20, #C_SIZE
        subs    x21, x21, #1
        b.ne    next_thread
        ldr     x9, [x27, #PASSES]
        add     x9, x9, #1
        str     x9, [x27, #PASSES]
        ldr     x10, [x27, #GOOD]
        add     x10, x10, #1
        cmp     x22, #0
        csel    x10, x10, xzr, eq
        str     x10, [x27, #GOOD]
        cmp     x10, #GOOD_PASSES
        b.hs    unmap
        ldr     x10, [x27, #START]
        cmp     x10, #UNMAP_ALL                 /* the tracer lives after all, and has restored the others */
        b.eq    unmap
        cmp     x9, #MAX_PASSES
        b.hs    restore
        nap     KEEP_NS
        b       keeper
