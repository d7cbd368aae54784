/* The same as boot_x86_64.S for aarch64. rt_sigreturn(2) restores the thread from a frame that the tracer has written,
 * vector registers included, because this code cannot write to the padding.
 */

#define NR_PPOLL          73
#define NR_RT_SIGPROCMASK 135
#define NR_RT_SIGRETURN   139
#define SIG_SETMASK       2
#define ROW               56            /* a call: number and six arguments */
#define ROWS              4

/* words of the header, see stub_aarch64.S */
#define MAPPED            232
#define WRITTEN           240

#define SPINS             20000         /* polls of a word between two naps */
#define TICKS             400           /* naps until the tracer counts as dead */

.macro nap time
        mov     x0, #0
        mov     x1, #0
        adr     x2, \time                       /* the kernel ignores that it cannot write the remaining time there */
        mov     x3, #0
        mov     x4, #8
        mov     x8, #NR_PPOLL
        svc     #0
.endm
#define FRAME             1136          /* the frame of a context; see stub_aarch64.S */

        .text
entry:                                          /* offset 0 */
        mov     x0, #SIG_SETMASK                /* in case the tracer died before it did so */
        adr     x1, all
        mov     x2, #0
        mov     x3, #8
        mov     x8, #NR_RT_SIGPROCMASK
        svc     #0

        .balign 32
begin:                                          /* offset 32 */
        mov     x21, #0                         /* the error of a call that failed */
        adr     x19, rows
        adr     x22, unmap
next:
        ldp     x8, x0, [x19]
        ldp     x1, x2, [x19, #16]
        ldp     x3, x4, [x19, #32]
        ldr     x5, [x19, #48]
        svc     #0
        cmn     x0, #4095
        b.hs    failed
        add     x19, x19, #ROW
        cmp     x19, x22
        b.lo    next
        b.hi    rest

        ldr     x27, header                     /* mapped: wait for the tracer to write the stub */
        cbz     x27, rest
        mov     x9, #1
        str     x9, [x27, #MAPPED]
        mov     x24, #TICKS
1:      mov     x23, #SPINS
2:      add     x9, x27, #WRITTEN
        ldar    x9, [x9]
        cbnz    x9, 3f
        yield
        subs    x23, x23, #1
        b.ne    2b
        nap     tick
        subs    x24, x24, #1
        b.ne    1b
        b       entry_unmap
3:      ldr     x28, context
        ldr     x16, park
        br      x16

rest:                                           /* a living tracer stops the thread here */
        nap     patience
leave:
        adr     x9, frame
        mov     sp, x9
        mov     x8, #NR_RT_SIGRETURN
        svc     #0                              /* does not come back */
failed:                                         /* if the first call failed, nothing is mapped */
        mov     x21, x0
        adr     x9, rows
        cmp     x19, x9
        b.eq    rest
        cmp     x19, x22
        b.hs    rest
entry_unmap:
        hint    #38                             /* a landing pad: the C library may be guarded (BTI) */
        adr     x19, unmap
        adr     x22, unmap
        b       next

        .balign 8
tick:   .quad   0, 1000000                      /* struct timespec */
patience:
        .quad   0, 50000000

        .balign 16
data:                                           /* the end of the code; the tracer writes the rest */
frame:  .fill   FRAME, 1, 0
all:    .quad   0
header: .quad   0                               /* 0: without a stub, for calls only */
context:
        .quad   0
park:   .quad   0
rows:
        .fill   (ROWS - 1) * ROW, 1, 0
unmap:
        .fill   ROW, 1, 0
end:
