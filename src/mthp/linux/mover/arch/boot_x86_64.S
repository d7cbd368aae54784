/* The code in the padding behind code of the target: it maps or unmaps the memory for a window, and restores the thread
 * that ran it, with or without a tracer. Between the two the thread runs the stub.
 *
 * The code never writes to itself (the padding may only be executed), touches no byte of a stack, uses no vector or FPU
 * register, and has neither a call nor a return.
 */

#define NR_RT_SIGPROCMASK 14
#define NR_PPOLL          271
#define SIG_SETMASK       2
#define ROW               56            /* a call: number and six arguments */
#define ROWS              4

/* words of the header, see stub_x86_64.S */
#define MAPPED            232
#define WRITTEN           240

#define SPINS             20000         /* polls of a word between two naps, about half a millisecond */
#define TICKS             400           /* naps until the tracer counts as dead */

.macro signal_mask where
        mov     $NR_RT_SIGPROCMASK, %eax
        mov     $SIG_SETMASK, %edi
        lea     \where(%rip), %rsi
        mov     $0, %edx
        mov     $8, %r10d
        syscall
.endm

.macro nap time
        mov     $NR_PPOLL, %eax
        xor     %edi, %edi
        xor     %esi, %esi
        lea     \time(%rip), %rdx               /* the kernel ignores that it cannot write the remaining time there */
        xor     %r10d, %r10d
        mov     $8, %r8d
        syscall
.endm

        .text
entry:                                          /* offset 0 */
        signal_mask all                         /* in case the tracer died before it did so */
        jmp     begin

        .balign 32
begin:                                          /* offset 32 */
        xor     %r13d, %r13d                    /* the error of a call that failed */
        lea     rows(%rip), %r12
next:
        mov     (%r12), %rax
        mov     8(%r12), %rdi
        mov     16(%r12), %rsi
        mov     24(%r12), %rdx
        mov     32(%r12), %r10
        mov     40(%r12), %r8
        mov     48(%r12), %r9
        syscall
        cmp     $-4095, %rax
        jae     failed
        add     $ROW, %r12
        lea     unmap(%rip), %rax
        cmp     %rax, %r12
        jb      next
        ja      rest

        mov     header(%rip), %rbp              /* mapped: wait for the tracer to write the stub */
        test    %rbp, %rbp
        jz      rest
        movq    $1, MAPPED(%rbp)
        mov     $TICKS, %r15d
1:      mov     $SPINS, %r14d
2:      cmpq    $0, WRITTEN(%rbp)
        jne     3f
        pause
        dec     %r14d
        jnz     2b
        nap     tick
        dec     %r15d
        jnz     1b
        jmp     entry_unmap
3:      mov     context(%rip), %rbx
        jmp     *park(%rip)

rest:                                           /* a living tracer stops the thread here */
        nap     patience
leave:
        lea     flags(%rip), %rsp
        popfq                                   /* no instruction below changes flags */
        mov     stack(%rip), %rsp
        signal_mask mask                        /* a handler may run here, on the thread's own stack */
        mov     registers+0(%rip), %rax
        mov     registers+8(%rip), %rbx
        mov     registers+16(%rip), %rcx
        mov     registers+24(%rip), %rdx
        mov     registers+32(%rip), %rsi
        mov     registers+40(%rip), %rdi
        mov     registers+48(%rip), %rbp
        mov     registers+56(%rip), %r8
        mov     registers+64(%rip), %r9
        mov     registers+72(%rip), %r10
        mov     registers+80(%rip), %r11
        mov     registers+88(%rip), %r12
        mov     registers+96(%rip), %r13
        mov     registers+104(%rip), %r14
        mov     registers+112(%rip), %r15
        jmp     *home(%rip)
failed:                                         /* if the first call failed, nothing is mapped */
        mov     %rax, %r13
        lea     rows(%rip), %rax
        cmp     %rax, %r12
        je      rest
        lea     unmap(%rip), %rax
        cmp     %rax, %r12
        jae     rest

        .balign 8
entry_unmap:
        lea     unmap(%rip), %r12
        jmp     next

tick:   .quad   0, 1000000                      /* struct timespec */
patience:
        .quad   0, 50000000

        .balign 8
data:                                           /* the end of the code; the tracer writes the rest */
home:   .quad   0
stack:  .quad   0
flags:  .quad   0
registers:
        .fill   15, 8, 0
mask:   .quad   0
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
