/* What boot_x86_64.S does, for aarch64. The thread is restored by rt_sigreturn(2), from a frame that the tracer has
 * written, vector registers included: the padding cannot be written to from here.
 */

#define NR_RT_SIGPROCMASK 135
#define NR_RT_SIGRETURN   139
#define SIG_SETMASK       2
#define ROW               56            /* a call: number and six arguments */
#define ROWS              4
#define FRAME             1136          /* the frame of a context; see stub_aarch64.S */

        .text
entry:                                          /* offset 0 */
        mov     x0, #SIG_SETMASK                /* in case the tracer died before it did that */
        adr     x1, all
        mov     x2, #0
        mov     x3, #8
        mov     x8, #NR_RT_SIGPROCMASK
        svc     #0

        .balign 32
begin:                                          /* offset 32 */
        adr     x19, rows
        adr     x20, end
next:
        ldp     x8, x0, [x19]
        ldp     x1, x2, [x19, #16]
        ldp     x3, x4, [x19, #32]
        ldr     x5, [x19, #48]
        svc     #0
        cmn     x0, #4095
        b.hs    failed
        add     x19, x19, #ROW
        cmp     x19, x20
        b.lo    next
leave:
        adr     x9, frame
        mov     sp, x9
        mov     x8, #NR_RT_SIGRETURN
        svc     #0                              /* does not come back */
failed:                                         /* without the first there is nothing to unmap */
        adr     x9, rows
        cmp     x19, x9
        b.eq    leave
        adr     x9, unmap
        cmp     x19, x9
        b.hs    leave
entry_unmap:
        hint    #38                             /* a landing pad: the C library may be guarded (BTI) */
        adr     x19, unmap
        adr     x20, end
        b       next

        .balign 16
data:                                           /* the end of the code; the rest is written by the tracer */
frame:  .fill   FRAME, 1, 0
all:    .quad   0
rows:
        .fill   (ROWS - 1) * ROW, 1, 0
unmap:
        .fill   ROW, 1, 0
end:
