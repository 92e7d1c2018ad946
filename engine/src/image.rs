//! From the bytes of an image file to the patches that a model of images reads.

use std::io::Cursor;

use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageReader, Limits};
use strata_layers::Image;
use strata_layers::image::Resample;

/// Most pixels along a side of a file.
const MAX_SIDE: u32 = 32_768;
/// Most bytes that a decoder may take.
const MAX_BYTES: u64 = 1 << 30;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "{name}: {found}; expected a PNG, JPEG, WebP, BMP or GIF image of at most {MAX_SIDE} pixels a side"
)]
pub struct Error {
    name: String,
    found: String,
}

/// The patches of an image file, (patches, channels · patch · patch): brought to size by its shorter
/// side, cut out in the middle, made 0 to 1 and normalised. `name` is the file's, for messages.
///
/// Transparency is dropped, grey is spread over the channels and colour made grey where the model has
/// one channel; 16 bits become 8.
pub fn patches(bytes: &[u8], name: &str, spec: &Image) -> Result<Vec<f32>, Error> {
    let fault = |found: String| Error {
        name: name.into(),
        found,
    };
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| fault(e.to_string()))?;
    if reader.format().is_none() {
        return Err(fault("it begins like no image".into()));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let decoded = reader.decode().map_err(|e| fault(e.to_string()))?;
    if decoded.width() == 0 || decoded.height() == 0 {
        return Err(fault("it has no pixels".into()));
    }
    Ok(cut(&sized(&decoded, spec), spec))
}

/// The part of an image that the model sees, channel after channel, 0 to 255.
fn sized(decoded: &DynamicImage, spec: &Image) -> Vec<f32> {
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let shorter = (spec.size as f64 / spec.crop) as usize;
    let longer = |a: usize, b: usize| (shorter as f64 * a as f64 / b as f64) as usize;
    let (to_width, to_height) = match width <= height {
        true => (shorter, longer(height, width)),
        false => (longer(width, height), shorter),
    };
    let filter = match spec.resample {
        Resample::Bilinear => FilterType::Triangle,
        Resample::Bicubic => FilterType::CatmullRom,
    };
    let offset =
        |whole: usize| (whole.saturating_sub(spec.size) as f64 / 2.0).round_ties_even() as u32;
    let (left, top) = (offset(to_width), offset(to_height));
    let (to_width, to_height, side) = (to_width as u32, to_height as u32, spec.size as u32);
    let mut out = Vec::with_capacity(spec.channels * spec.size * spec.size);
    if spec.channels == 1 {
        let grey = imageops::resize(&decoded.to_luma8(), to_width, to_height, filter);
        let part = imageops::crop_imm(&grey, left, top, side, side).to_image();
        out.extend(part.pixels().map(|p| f32::from(p.0[0])));
    } else {
        let colour = imageops::resize(&decoded.to_rgb8(), to_width, to_height, filter);
        let part = imageops::crop_imm(&colour, left, top, side, side).to_image();
        for channel in 0..3 {
            out.extend(part.pixels().map(|p| f32::from(p.0[channel])));
        }
    }
    out
}

/// Normalised patches of (channels, size, size) pixels.
fn cut(pixels: &[f32], spec: &Image) -> Vec<f32> {
    let (size, patch, stride) = (spec.size, spec.patch, spec.stride.unwrap_or(spec.patch));
    let mut out = Vec::with_capacity(spec.patches() * spec.patch_width());
    for (y, x) in (0..spec.side()).flat_map(|y| (0..spec.side()).map(move |x| (y, x))) {
        for channel in 0..spec.channels {
            let (mean, std) = (spec.mean[channel] as f32, spec.std[channel] as f32);
            for row in 0..patch {
                let start = channel * size * size + (y * stride + row) * size + x * stride;
                let row = &pixels[start..start + patch];
                out.extend(row.iter().map(|p| (p / 255.0 - mean) / std));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_layers::image::ClassToken;

    fn spec() -> Image {
        Image {
            size: 4,
            patch: 2,
            stride: None,
            channels: 3,
            class_token: ClassToken::Middle,
            mean: vec![0.0; 3],
            std: vec![1.0; 3],
            crop: 1.0,
            resample: Resample::Bicubic,
        }
    }

    fn png(width: u32, height: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Vec<u8> {
        let image = image::RgbImage::from_fn(width, height, |x, y| image::Rgb(pixel(x, y)));
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn patches_go_from_left_to_right_and_hold_channel_after_channel() {
        let bytes = png(4, 4, |x, y| [(16 * y + x) as u8, 100, 200]);
        let patches = patches(&bytes, "a.png", &spec()).unwrap();
        assert_eq!(patches.len(), 4 * 12);
        let near =
            |at: usize, value: f32| assert!((patches[at] * 255.0 - value).abs() < 0.01, "{at}");
        // The second patch: columns 2 and 3 of rows 0 and 1.
        for (i, value) in [2.0, 3.0, 18.0, 19.0, 100.0].into_iter().enumerate() {
            near(12 + i, value);
        }
        near(12 + 8, 200.0);
    }

    #[test]
    fn the_middle_of_a_wide_image_is_seen() {
        let bytes = png(12, 4, |x, _| {
            if (4..8).contains(&x) {
                [255; 3]
            } else {
                [0; 3]
            }
        });
        let patches = patches(&bytes, "wide.png", &spec()).unwrap();
        assert!(patches.iter().all(|p| *p == 1.0), "{patches:?}");
    }

    #[test]
    fn what_is_no_image_is_an_error() {
        let whole = png(8, 8, |x, y| [x as u8, y as u8, 0]);
        let mut huge = whole.clone();
        huge[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
        let cases: [&[u8]; 5] = [
            b"",
            b"hello",
            &whole[..whole.len() / 2],
            &whole[..20],
            &huge,
        ];
        for bytes in cases {
            let error = patches(bytes, "x.png", &spec()).unwrap_err().to_string();
            assert!(
                error.starts_with("x.png: ") && error.contains("expected a PNG"),
                "{error}"
            );
        }
    }
}
