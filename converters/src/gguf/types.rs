//! The element types of GGUF files: their numbers, names and sizes.

/// An element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Type {
    /// Its number in files.
    pub number: u32,
    /// What it is called.
    pub name: &'static str,
    /// Elements of a block.
    pub elements: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

/// All that have a number. Those that no weight runs as can still be listed.
const TYPES: [Type; 34] = {
    const fn t(number: u32, name: &'static str, elements: usize, bytes: usize) -> Type {
        Type {
            number,
            name,
            elements,
            bytes,
        }
    }
    [
        t(0, "F32", 1, 4),
        t(1, "F16", 1, 2),
        t(2, "Q4_0", 32, 18),
        t(3, "Q4_1", 32, 20),
        t(6, "Q5_0", 32, 22),
        t(7, "Q5_1", 32, 24),
        t(8, "Q8_0", 32, 34),
        t(9, "Q8_1", 32, 36),
        t(10, "Q2_K", 256, 84),
        t(11, "Q3_K", 256, 110),
        t(12, "Q4_K", 256, 144),
        t(13, "Q5_K", 256, 176),
        t(14, "Q6_K", 256, 210),
        t(15, "Q8_K", 256, 292),
        t(16, "IQ2_XXS", 256, 66),
        t(17, "IQ2_XS", 256, 74),
        t(18, "IQ3_XXS", 256, 98),
        t(19, "IQ1_S", 256, 50),
        t(20, "IQ4_NL", 32, 18),
        t(21, "IQ3_S", 256, 110),
        t(22, "IQ2_S", 256, 82),
        t(23, "IQ4_XS", 256, 136),
        t(24, "I8", 1, 1),
        t(25, "I16", 1, 2),
        t(26, "I32", 1, 4),
        t(27, "I64", 1, 8),
        t(28, "F64", 1, 8),
        t(29, "IQ1_M", 256, 56),
        t(30, "BF16", 1, 2),
        t(34, "TQ1_0", 256, 54),
        t(35, "TQ2_0", 256, 66),
        t(39, "MXFP4", 32, 17),
        t(40, "NVFP4", 64, 36),
        t(41, "Q1_0", 128, 18),
    ]
};

impl Type {
    /// The type of this number.
    pub fn numbered(number: u32) -> Option<Type> {
        TYPES.into_iter().find(|t| t.number == number)
    }

    /// The type of this name.
    pub fn named(name: &str) -> Option<Type> {
        TYPES.into_iter().find(|t| t.name == name)
    }

    /// Bytes of a tensor, outermost size first; none if its rows are no whole blocks, or too many.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let (cols, outer) = shape.split_last()?;
        if !cols.is_multiple_of(self.elements) {
            return None;
        }
        let row = (cols / self.elements).checked_mul(self.bytes)?;
        outer.iter().try_fold(row, |a, &n| a.checked_mul(n))
    }
}

#[cfg(test)]
mod tests {
    use strata_kernels::Format;

    use super::*;

    #[test]
    fn types_that_run_have_the_sizes_of_their_formats() {
        let mut found = 0;
        for t in TYPES {
            if let Some(format) = Format::named(&t.name.to_lowercase()) {
                assert_eq!(
                    (t.elements, t.bytes),
                    (format.block().elements, format.block().bytes),
                    "{}",
                    t.name
                );
                found += 1;
            }
        }
        let known = Format::ALL.into_iter().filter(|f| !f.scales_rows());
        assert_eq!(found, known.count());
        assert_eq!(Type::numbered(4), None);
        let q8 = Type::numbered(8).unwrap();
        assert_eq!(q8.bytes_of(&[2, 64]), Some(2 * 2 * 34));
        assert_eq!(q8.bytes_of(&[2, 48]), None);
        assert_eq!(q8.bytes_of(&[usize::MAX, 64]), None);
    }
}
