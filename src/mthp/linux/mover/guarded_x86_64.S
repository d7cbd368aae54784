# Move blocks of the very process that calls it, one after another, while its other threads go on.
#
#   long guarded_move(struct arguments *)        System V calling convention
#
# guarded.py explains it. From the first instruction to the last the code touches only the registers, the stack, the
# arguments, the two scratch areas and the block's mapping by system call: no other memory of the program, which might
# lie in the block.
#
# arguments, 64-bit words at these offsets:
#   0 operations left   8 userfaultfd   16 away: scratch, registered   24 place: scratch, aligned like a block
#   32 first operation left: {block, length, error, stage}             40 bytes to bring back   48 bytes brought back
#   64 struct uffdio_register   96 struct uffdio_move or uffdio_copy, alike   136 struct uffdio_range
# returns
#   0 all done   1 one done, and the place is lost   2 a block could not be put back

    .intel_syntax noprefix
    .text
    push    rbx
    push    rbp
    push    r12
    push    r13
    push    r14
    push    r15
    mov     rbx, rdi
    cld
next_block:
    xor     eax, eax
    cmp     qword ptr [rbx], 0
    je      leave_with_rax
    mov     r12, [rbx+32]
    mov     r15, [r12]              # block
    mov     r14, [r12+8]            # length
    mov     rbp, [rbx+24]           # place
    mov     [rbx+64], r15
    mov     [rbx+72], r14
    mov     qword ptr [rbx+80], 1   # UFFDIO_REGISTER_MODE_MISSING
    mov     qword ptr [rbx+88], 0
    mov     [rbx+136], r15
    mov     [rbx+144], r14
    mov     esi, 0xc020aa00         # UFFDIO_REGISTER
    lea     rdx, [rbx+64]
    call    ioctl
    mov     qword ptr [r12+24], 1
    mov     [r12+16], rax
    test    rax, rax
    jnz     advance

    # block -> away: a thread that touches the block from now on waits
    mov     rdi, [rbx+16]
    mov     rsi, r15
    mov     rdx, r14
    call    describe
    mov     esi, 0xc028aa05         # UFFDIO_MOVE
    call    ioctl_described
    mov     rcx, [rbx+128]
    mov     qword ptr [r12+24], 2
    test    rax, rax
    jnz     bring_back

    # an empty twin of the block's mapping, at the place
    mov     rdi, r15
    mov     r10d, 7                 # MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
    mov     r8, rbp
    call    mremap
    mov     qword ptr [r12+24], 3
    mov     rcx, r14
    cmp     rax, rbp
    jne     bring_back

    # its first touch brings one folio
    mov     rsi, [rbx+16]
    mov     rdi, rbp
    mov     rcx, r14
    shr     rcx, 3
    rep movsq

    # the twin takes the block's place
    mov     rdi, rbp
    mov     r10d, 3                 # MREMAP_MAYMOVE | MREMAP_FIXED
    mov     r8, r15
    call    mremap
    mov     qword ptr [r12+24], 4
    mov     rcx, r14
    cmp     rax, r15
    jne     bring_back
    mov     qword ptr [r12+16], 0
    mov     qword ptr [r12+24], 0
    jmp     wake

bring_back:                         # rax: error; rcx: bytes that are away, or less than 1
    mov     [r12+16], rax
    mov     [rbx+40], rcx
    mov     qword ptr [rbx+48], 0
1:  mov     rcx, [rbx+48]
    cmp     rcx, [rbx+40]
    jge     brought_back
    mov     esi, 0xc028aa05         # UFFDIO_MOVE
    call    bring_rest
    jz      1b
    mov     esi, 0xc028aa03         # UFFDIO_COPY, if the page cannot be moved
    call    bring_rest
    jz      1b
    cmp     rax, -12                # ENOMEM: wait for memory
    jne     lost
    mov     eax, 24                 # sched_yield
    syscall
    jmp     1b
lost:
    mov     [r12+16], rax
    mov     qword ptr [r12+24], 5
    mov     eax, 2
    jmp     leave_with_rax
brought_back:
    mov     esi, 0x8010aa01         # UFFDIO_UNREGISTER
    lea     rdx, [rbx+136]
    call    ioctl

wake:
    mov     esi, 0x8010aa02         # UFFDIO_WAKE
    lea     rdx, [rbx+136]
    call    ioctl
    mov     eax, 28                 # madvise
    mov     rdi, [rbx+16]
    mov     rsi, r14
    mov     edx, 4                  # MADV_DONTNEED
    syscall
    mov     rax, [r12+24]
    cmp     rax, 2
    je      advance
    ja      place_lost
    # the twin has left the place: reserve it again, unless it was given away meanwhile
    mov     eax, 9                  # mmap
    mov     rdi, rbp
    mov     rsi, r14
    xor     edx, edx                # PROT_NONE
    mov     r10d, 0x104022          # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    mov     r8, -1
    xor     r9d, r9d
    syscall
    cmp     rax, rbp
    jne     place_lost
advance:
    add     qword ptr [rbx+32], 32
    dec     qword ptr [rbx]
    jmp     next_block
place_lost:
    add     qword ptr [rbx+32], 32
    dec     qword ptr [rbx]
    mov     eax, 1
leave_with_rax:
    pop     r15
    pop     r14
    pop     r13
    pop     r12
    pop     rbp
    pop     rbx
    ret

bring_rest:                         # with the request in esi; zero flag: some came back, or another attempt may succeed
    mov     rcx, [rbx+48]
    lea     rdi, [r15+rcx]
    mov     rdx, [rbx+40]
    sub     rdx, rcx
    push    rsi
    mov     rsi, [rbx+16]
    add     rsi, rcx
    call    describe
    pop     rsi
    call    ioctl_described
    mov     rcx, [rbx+128]
    cmp     rcx, 0
    jle     2f
    add     [rbx+48], rcx
    xor     ecx, ecx
    ret
2:  cmp     rax, -11                # EAGAIN
    ret
describe:                           # rdi to, rsi from, rdx length
    mov     [rbx+96], rdi
    mov     [rbx+104], rsi
    mov     [rbx+112], rdx
    mov     qword ptr [rbx+120], 0
    mov     qword ptr [rbx+128], 0
    ret
ioctl_described:
    lea     rdx, [rbx+96]
ioctl:                              # esi request, rdx argument
    mov     eax, 16
    mov     rdi, [rbx+8]
    syscall
    ret
mremap:                             # rdi from, r10 flags, r8 to
    mov     eax, 25
    mov     rsi, r14
    mov     rdx, r14
    syscall
    ret
