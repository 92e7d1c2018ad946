//! Views on storages: an offset, sizes, and how far it is from one entry of a dimension to the next.

/// Whether the elements lie in the order of their places, without gaps.
pub(crate) fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut run = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != run {
            return false;
        }
        run = run.saturating_mul(size);
    }
    true
}

/// Number of elements; none if it overflows.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1, |a: usize, &n| a.checked_mul(n))
}

/// From the first element to behind the last one, in elements: Σ (size − 1) · stride + 1. None if it
/// overflows.
pub(crate) fn extent(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let each = shape.iter().zip(strides);
    each.map(|(size, stride)| (size - 1).checked_mul(*stride))
        .try_fold(1, |sum: usize, n| sum.checked_add(n?))
}

/// The elements of a view, of `size` bytes each, one behind the other. `bytes` begins with the first of
/// them; a view that does not lie within it ends early.
pub(crate) fn gather(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let count = elements(shape).unwrap_or(0);
    let mut out = Vec::with_capacity(count.saturating_mul(size));
    let mut at = vec![0; shape.len()];
    for _ in 0..count {
        let places = at.iter().zip(strides);
        let first: usize = places.map(|(n, stride)| n * stride).sum::<usize>() * size;
        let Some(element) = bytes.get(first..first + size) else {
            break;
        };
        out.extend_from_slice(element);
        for (n, size) in at.iter_mut().zip(shape).rev() {
            *n += 1;
            if *n < *size {
                break;
            }
            *n = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_gathered_in_the_order_of_their_places() {
        let bytes: Vec<u8> = (0..12).collect();
        let check = |shape: &[usize], strides: &[usize], expected: &[u8]| {
            assert_eq!(gather(&bytes, 1, shape, strides), expected, "{shape:?}");
        };
        check(&[2, 3], &[3, 1], &[0, 1, 2, 3, 4, 5]);
        check(&[3, 2], &[1, 3], &[0, 3, 1, 4, 2, 5]);
        check(&[2, 2, 2], &[1, 0, 4], &[0, 4, 0, 4, 1, 5, 1, 5]);
        check(&[], &[], &[0]);
        check(&[0, 4], &[4, 1], &[]);
        assert_eq!(gather(&bytes, 2, &[2], &[2]), [0, 1, 4, 5]);
    }

    #[test]
    fn sizes_are_checked_for_overflow() {
        assert_eq!(extent(&[2, 3], &[10, 2]), Some(15));
        assert_eq!(extent(&[0, usize::MAX], &[usize::MAX, 1]), Some(0));
        assert_eq!(extent(&[3], &[usize::MAX]), None);
        assert_eq!(elements(&[usize::MAX, 2]), None);
        assert!(is_contiguous(&[2, 1, 3], &[3, 77, 1]) && is_contiguous(&[], &[]));
        assert!(!is_contiguous(&[2, 3], &[1, 2]) && !is_contiguous(&[2, 3], &[0, 1]));
    }
}
