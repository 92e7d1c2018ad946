//! What a model of images reads: square patches, each multiplied with one matrix, a class token among
//! them, and a learned vector for every place (Dosovitskiy et al., 2020).

use crate::param::{Check, Fields};
use crate::weights::{Init, WeightSpec};
use crate::yaml::Faults;
use crate::{params, words};

/// Where the class token stands among the patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClassToken {
    /// Before them.
    First,
    /// After the first half of them.
    Middle,
    /// After them.
    Last,
}

words!(ClassToken as "a place" {
    First = "first",
    Middle = "middle",
    Last = "last",
});

/// How an image is brought to size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resample {
    /// By triangles.
    Bilinear,
    /// By the cubic of Catmull and Rom.
    Bicubic,
}

words!(Resample as "a way to resample" {
    Bilinear = "bilinear",
    Bicubic = "bicubic",
});

params! {
    /// Images, and how they become tokens.
    pub struct Image as "image" {
        /// Pixels along each side of the image that the model sees.
        size: usize,
        /// Pixels along each side of a patch.
        patch: usize,
        /// Pixels from one patch to the next; those of a patch if left out.
        stride: Option<usize> = None,
        /// 3 for red, green and blue, 1 for grey.
        channels: usize = 3,
        /// Where the class token stands.
        class_token: ClassToken,
        /// Taken from each channel, whose values run from 0 to 1.
        mean: Vec<f64>,
        /// What each channel is then divided by.
        std: Vec<f64>,
        /// The share of the shorter side that is kept, in the middle.
        crop: f64 = 1.0,
        /// How an image is brought to size.
        resample: Resample = Resample::Bicubic,
    }
}

/// Most pixels along a side: far above any model, far below what memory could not hold.
const MAX_SIDE: usize = 8192;

impl Check for Image {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let stride = self.stride.unwrap_or(self.patch);
        let sizes = [
            ("size", self.size),
            ("patch", self.patch),
            ("stride", stride),
        ];
        fields.positive(&sizes, faults);
        if self.size > MAX_SIDE || self.patch > self.size {
            let message = format!(
                "patches of {} in an image of {}; a patch must fit, and a side is at most {MAX_SIDE}",
                self.patch, self.size
            );
            faults.add(fields.at("size"), message);
        }
        if self.channels != 1 && self.channels != 3 {
            let message = format!("`channels` is {}; it must be 1 or 3", self.channels);
            faults.add(fields.at("channels"), message);
        }
        for (key, list) in [("mean", &self.mean), ("std", &self.std)] {
            if list.len() != self.channels {
                let message = format!(
                    "`{key}` has {} numbers for {} channels",
                    list.len(),
                    self.channels
                );
                faults.add(fields.at(key), message);
            }
        }
        if self.std.iter().any(|s| *s <= 0.0) {
            faults.add(fields.at("std"), "each number of `std` must be positive");
        }
        if !(self.crop > 0.0 && self.crop <= 1.0) {
            let message = format!(
                "`crop` is {}; it must be more than 0 and at most 1",
                self.crop
            );
            faults.add(fields.at("crop"), message);
        }
    }
}

impl Image {
    /// Patches along a side.
    pub fn side(&self) -> usize {
        (self.size - self.patch.min(self.size)) / self.stride.unwrap_or(self.patch).max(1) + 1
    }

    /// Patches of an image.
    pub fn patches(&self) -> usize {
        self.side() * self.side()
    }

    /// Tokens of an image: its patches and the class token.
    pub fn tokens(&self) -> usize {
        self.patches() + 1
    }

    /// Numbers of a patch: channel after channel, row after row.
    pub fn patch_width(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// The class token's place.
    pub fn class_place(&self) -> usize {
        match self.class_token {
            ClassToken::First => 0,
            ClassToken::Middle => self.patches() / 2,
            ClassToken::Last => self.patches(),
        }
    }

    /// Its weights: the patches' matrix and bias, the class token and the places.
    pub fn weights(&self, d_model: usize) -> Vec<WeightSpec> {
        vec![
            WeightSpec::matrix("patch", d_model, self.patch_width()),
            WeightSpec::vector("patch.bias", &[d_model], Init::Constant(0.0)),
            WeightSpec::vector("class_token", &[d_model], Init::Normal),
            WeightSpec::vector("positions", &[self.tokens(), d_model], Init::Normal),
        ]
    }
}
