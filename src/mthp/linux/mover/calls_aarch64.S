/* Make many system calls, one after the other: x0 points to rows of eight words (number, six arguments, and room for
 * the result), x1 is their number. A leaf function in C; calls.py has it assembled, and a test compares the two.
 */
        .text
        mov     x9, x0
        mov     x10, x1
        cbz     x10, 2f
1:      ldp     x8, x0, [x9]
        ldp     x1, x2, [x9, #16]
        ldp     x3, x4, [x9, #32]
        ldr     x5, [x9, #48]
        svc     #0
        str     x0, [x9, #56]
        add     x9, x9, #64
        subs    x10, x10, #1
        b.ne    1b
2:      ret
