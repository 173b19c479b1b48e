//! What the processor has.

/// XCR0: the parts of the extended state that the kernel has switched on; 0 on a processor without XSAVE.
#[must_use]
pub fn xcr0() -> u64 {
    if !std::is_x86_feature_detected!("xsave") {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: xgetbv is there if the operating system uses XSAVE, which the detection includes; it changes two registers.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}
