//! Loops over the columns of short rows: whole vectors first, then what is left, without a check per load.

use crate::simd::Simd;

/// Runs `$body` for each column `$i` where a vector starts, below `$c`; the constant `$full` says whether a whole
/// vector fits there. The body stands twice in the code, so that neither copy has a branch.
macro_rules! over_columns {
    ($lanes:expr, $c:expr, |$i:ident, $full:ident| $body:expr) => {{
        let mut $i = 0;
        {
            const $full: bool = true;
            while $i + $lanes <= $c {
                $body;
                $i += $lanes;
            }
        }
        {
            const $full: bool = false;
            if $i < $c {
                $body;
            }
        }
    }};
}
pub(crate) use over_columns;

/// The vector at column `i` of a row; past the row's end the lanes are 0.
///
/// # Safety
/// `i + LANES <= row.len()` if `FULL`, else `i <= row.len() <= i + LANES`.
#[inline(always)]
pub(crate) unsafe fn get<S: Simd, const FULL: bool>(s: S, row: &[f32], i: usize) -> S::V {
    debug_assert!(if FULL { i + S::LANES <= row.len() } else { i <= row.len() && row.len() <= i + S::LANES });
    // SAFETY: the caller's contract keeps the elements inside the row.
    unsafe {
        if FULL { s.load_ptr(row.as_ptr().add(i)) } else { s.load_partial_ptr(row.as_ptr().add(i), row.len() - i) }
    }
}

/// Stores a vector at column `i` of a row, or the lanes that fit.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
pub(crate) unsafe fn set<S: Simd, const FULL: bool>(s: S, row: &mut [f32], i: usize, v: S::V) {
    debug_assert!(if FULL { i + S::LANES <= row.len() } else { i <= row.len() && row.len() <= i + S::LANES });
    // SAFETY: the caller's contract keeps the elements inside the row.
    unsafe {
        if FULL {
            s.store_ptr(row.as_mut_ptr().add(i), v);
        } else {
            s.store_partial_ptr(row.as_mut_ptr().add(i), row.len() - i, v);
        }
    }
}
