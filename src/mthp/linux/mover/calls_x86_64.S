/* Make many system calls, one after the other: rdi points to rows of eight words (number, six arguments, and room for
 * the result), rsi is their number. A leaf function in C; calls.py has it assembled, and a test compares the two.
 */
        .text
        push    %rbx
        push    %r12
        mov     %rdi, %rbx
        mov     %rsi, %r12
        jmp     2f
1:      mov     (%rbx), %rax
        mov     8(%rbx), %rdi
        mov     16(%rbx), %rsi
        mov     24(%rbx), %rdx
        mov     32(%rbx), %r10
        mov     40(%rbx), %r8
        mov     48(%rbx), %r9
        syscall
        mov     %rax, 56(%rbx)
        add     $64, %rbx
2:      sub     $1, %r12
        jae     1b
        pop     %r12
        pop     %rbx
        ret
