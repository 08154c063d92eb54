//! Where a tensor's elements lie in a file: views with strides, so that a transposed or packed tensor is only another
//! description of the same bytes.

use std::borrow::Cow;

use super::element::Element;

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slot {
    pub element: Element,
    pub shape: Vec<usize>,
    /// Joined along the first axis.
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    /// This many elements of value zero, which no file holds.
    Zeros(usize),
    View(View),
}

/// Element `(i, j, …)` lies at byte `start + width·(i·strides[0] + j·strides[1] + …)`.
#[derive(Clone, Debug, PartialEq)]
struct View {
    start: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Number of elements of a shape; none where it overflows.
pub(super) fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

impl View {
    fn is_contiguous(&self) -> bool {
        let expected = contiguous(&self.shape);
        // The stride of an axis of one element says nothing.
        self.shape.iter().zip(self.strides.iter().zip(&expected)).all(|(&d, (s, e))| d == 1 || s == e)
    }
}

impl Slot {
    /// A tensor whose elements lie side by side from byte `start`.
    pub fn plain(element: Element, shape: Vec<usize>, start: usize) -> Slot {
        let strides = contiguous(&shape);
        Slot { element, shape: shape.clone(), parts: vec![Part::View(View { start, shape, strides })] }
    }

    /// A tensor that starts `offset` elements into the storage that lies in `bytes` of the file.
    ///
    /// # Errors
    /// A view that reaches beyond the storage.
    pub fn strided(
        element: Element,
        bytes: (usize, usize),
        offset: usize,
        shape: Vec<usize>,
        strides: Vec<usize>,
    ) -> Result<Slot, String> {
        if shape.len() != strides.len() {
            return Err(format!("{} sizes, {} strides", shape.len(), strides.len()));
        }
        let beyond = || format!("a tensor {shape:?} with strides {strides:?} reaches beyond its storage");
        let held = (bytes.1 - bytes.0) / element.width();
        let numel = count(&shape).ok_or_else(beyond)?;
        let mut last = offset;
        if numel > 0 {
            for (&d, &s) in shape.iter().zip(&strides) {
                last = (d - 1).checked_mul(s).and_then(|n| last.checked_add(n)).ok_or_else(beyond)?;
            }
            if last >= held {
                return Err(beyond());
            }
        }
        // A tensor without elements may stand anywhere.
        let start = if numel > 0 { bytes.0 + offset * element.width() } else { bytes.0 };
        Ok(Slot { element, shape: shape.clone(), parts: vec![Part::View(View { start, shape, strides })] })
    }

    /// A tensor of zeros.
    pub fn zeros(element: Element, shape: Vec<usize>) -> Slot {
        let parts = vec![Part::Zeros(count(&shape).unwrap_or(0))];
        Slot { element, shape, parts }
    }

    /// The matrix with its axes exchanged.
    ///
    /// # Errors
    /// No matrix.
    pub fn transposed(mut self) -> Result<Slot, String> {
        match &mut self.parts[..] {
            [Part::View(view)] if view.shape.len() == 2 => {
                view.shape.reverse();
                view.strides.reverse();
                self.shape.reverse();
                Ok(self)
            }
            _ => Err(format!("a tensor {:?} is no matrix to be transposed", self.shape)),
        }
    }

    /// The tensor without its axes of one element.
    pub fn squeezed(mut self) -> Slot {
        self.shape.retain(|&d| d != 1);
        for part in &mut self.parts {
            if let Part::View(view) = part {
                let kept: Vec<_> = view.shape.iter().zip(&view.strides).filter(|(d, _)| **d != 1).collect();
                let (shape, strides) = kept.into_iter().map(|(&d, &s)| (d, s)).unzip();
                (view.shape, view.strides) = (shape, strides);
            }
        }
        self
    }

    /// Tensors joined along their first axis.
    ///
    /// # Errors
    /// Different element types or sizes of the other axes.
    pub fn joined(slots: Vec<Slot>) -> Result<Slot, String> {
        let mut slots = slots.into_iter();
        let Some(mut whole) = slots.next() else { return Err("no tensors to be joined".into()) };
        for slot in slots {
            let fits = whole.element == slot.element && !whole.shape.is_empty() && !slot.shape.is_empty();
            if !fits || whole.shape[1..] != slot.shape[1..] {
                return Err(format!("{:?} and {:?} can't be joined", whole.shape, slot.shape));
            }
            whole.shape[0] += slot.shape[0];
            whole.parts.extend(slot.parts);
        }
        Ok(whole)
    }

    /// Bytes that its elements take when they lie side by side.
    pub fn byte_len(&self) -> Option<usize> {
        count(&self.shape)?.checked_mul(self.element.width())
    }

    /// The elements side by side.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> Cow<'a, [u8]> {
        if let [Part::View(view)] = &self.parts[..]
            && view.is_contiguous()
        {
            return Cow::Borrowed(&file[view.start..view.start + self.byte_len().unwrap_or(0)]);
        }
        let mut out = Vec::with_capacity(self.byte_len().unwrap_or(0));
        for part in &self.parts {
            match part {
                Part::Zeros(n) => out.resize(out.len() + n * self.element.width(), 0),
                Part::View(view) => gather(view, self.element.width(), file, &mut out),
            }
        }
        Cow::Owned(out)
    }
}

fn gather(view: &View, width: usize, file: &[u8], out: &mut Vec<u8>) {
    if count(&view.shape).unwrap_or(0) == 0 {
        return;
    }
    let mut at = vec![0; view.shape.len()];
    let mut place = view.start;
    loop {
        out.extend_from_slice(&file[place..place + width]);
        // The next index: the last axis first, as an odometer.
        let mut axis = view.shape.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            at[axis] += 1;
            place += width * view.strides[axis];
            if at[axis] < view.shape[axis] {
                break;
            }
            place -= width * view.strides[axis] * view.shape[axis];
            at[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_read_what_they_describe() {
        let file: Vec<u8> = (0..24).collect();
        let slot = |offset, shape: &[usize], strides: &[usize]| {
            Slot::strided(Element::U8, (4, 24), offset, shape.to_vec(), strides.to_vec())
        };
        assert_eq!(&*slot(1, &[2, 3], &[3, 1]).unwrap().bytes(&file), [5, 6, 7, 8, 9, 10]);
        assert_eq!(&*slot(0, &[3, 2], &[1, 3]).unwrap().bytes(&file), [4, 7, 5, 8, 6, 9]);
        assert_eq!(&*slot(2, &[2, 2], &[0, 1]).unwrap().bytes(&file), [6, 7, 6, 7]);
        assert_eq!(&*slot(19, &[], &[]).unwrap().bytes(&file), [23]);
        assert!(slot(99, &[0, 3], &[3, 1]).unwrap().bytes(&file).is_empty());
        for (offset, shape, strides) in
            [(15, [2, 3], [3, 1]), (0, [2, 3], [usize::MAX, 1]), (usize::MAX, [1, 1], [1, 1])]
        {
            assert!(slot(offset, &shape, &strides).is_err());
        }
        assert!(slot(0, &[usize::MAX, 2], &[0, 0]).is_err());
        assert!(slot(0, &[2], &[1, 1]).is_err());
        let t = slot(0, &[2, 3], &[3, 1]).unwrap().transposed().unwrap();
        assert_eq!((t.shape.as_slice(), &*t.bytes(&file)), (&[3, 2][..], &[4, 7, 5, 8, 6, 9][..]));
        let s = slot(0, &[1, 2, 1, 2], &[4, 2, 2, 1]).unwrap().squeezed();
        assert_eq!((s.shape.as_slice(), &*s.bytes(&file)), (&[2, 2][..], &[4, 5, 6, 7][..]));
        let parts = vec![slot(0, &[1, 2], &[2, 1]).unwrap(), slot(6, &[2, 2], &[1, 2]).unwrap()];
        let joined = Slot::joined(parts).unwrap();
        assert_eq!((joined.shape.as_slice(), &*joined.bytes(&file)), (&[3, 2][..], &[4, 5, 10, 12, 11, 13][..]));
        assert!(Slot::joined(vec![slot(0, &[2], &[1]).unwrap(), slot(0, &[1, 2], &[2, 1]).unwrap()]).is_err());
        assert_eq!(&*Slot::zeros(Element::I16, vec![2]).bytes(&file), [0; 4]);
    }
}
