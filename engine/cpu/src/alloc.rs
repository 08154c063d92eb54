//! An allocator whose large blocks start at a cache line.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, with blocks of [`LARGE`](CacheAligned::LARGE) bytes and more aligned to 64 bytes. The system
/// puts large blocks 16 bytes behind a page's start, where every 64-byte vector of an array straddles two cache lines.
///
/// A binary installs it with `#[global_allocator]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheAligned;

impl CacheAligned {
    /// Bytes from which on a block is aligned.
    pub const LARGE: usize = 4096;
    const LINE: usize = 64;

    /// The layout that the system is asked for; a function of the block's own layout alone.
    fn raised(layout: Layout) -> Layout {
        if layout.size() < Self::LARGE || layout.align() >= Self::LINE {
            return layout;
        }
        // It fails only where the size, rounded up, overflows: such a block can't be had anyway.
        layout.align_to(Self::LINE).unwrap_or(layout)
    }
}

// SAFETY: every call goes to `System`; a block is freed and resized with the layout that it was allocated with, which
// `raised` derives from the caller's.
unsafe impl GlobalAlloc for CacheAligned {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract; raising the alignment keeps the size.
        unsafe { System.alloc(Self::raised(layout)) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(Self::raised(layout)) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, Self::raised(layout)) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's contract: the size, rounded up to the alignment, does not overflow.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        let (held, next) = (Self::raised(layout), Self::raised(wanted));
        if held.align() == next.align() {
            // SAFETY: the block was allocated with `held`.
            return unsafe { System.realloc(block, held, size) };
        }
        // SAFETY: the new block is as long as what is copied, and another one.
        unsafe {
            let new = System.alloc(next);
            if !new.is_null() {
                std::ptr::copy_nonoverlapping(block, new, layout.size().min(size));
                System.dealloc(block, held);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_bytes_and_large_ones_are_aligned() {
        let layout = |size| Layout::array::<u8>(size).expect("a small size");
        for sizes in [[16, 8000, 100_000, 5000, 64], [8000, 16, 8000, 4096, 4095]] {
            // SAFETY: sizes are not 0; each block is used within its size and freed once with its layout.
            unsafe {
                let mut size = sizes[0];
                let mut block = CacheAligned.alloc(layout(size));
                block.write_bytes(7, size);
                for next in &sizes[1..] {
                    block = CacheAligned.realloc(block, layout(size), *next);
                    let kept = std::slice::from_raw_parts(block, size.min(*next));
                    assert!(kept.iter().all(|b| *b == 7));
                    assert!(*next < CacheAligned::LARGE || block.addr().is_multiple_of(64));
                    size = *next;
                    block.write_bytes(7, size);
                }
                CacheAligned.dealloc(block, layout(size));
            }
        }
    }
}
