//! Elementary functions on vectors, from the few operations that every instruction set has.
//!
//! Every lane takes the same path, so a value does not depend on its neighbours or its column.
//! Errors are measured against f64 in the tests below; a unit is one in the last place.

use super::simd::Simd;

/// ln 2 in nine bits, so that its multiples by exponents are exact.
const LN_2_UPPER: f32 = 0.693_359_4;
/// By how much that is too large.
const LN_2_LESS: f32 = 2.121_944_4e-4;

/// eˣ within 1 unit: e^x = 2ⁿ · e^r with |r| ≤ ln 2 / 2 (Cody and Waite; the polynomial of Cephes).
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Beyond these the result is infinite or zero; the order of arguments lets a NaN through.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN_2_UPPER), x);
    let r = s.fma(n, s.splat(LN_2_LESS), r);
    let p = s.fma(r, s.splat(1.987_569_1e-4), s.splat(1.398_199_9e-3));
    let p = s.fma(p, r, s.splat(8.333_452e-3));
    let p = s.fma(p, r, s.splat(4.166_579_6e-2));
    let p = s.fma(p, r, s.splat(1.666_666_5e-1));
    let p = s.fma(p, r, s.splat(0.5));
    let p = s.fma(s.mul(r, r), p, r);
    s.scale(s.add(p, s.splat(1.0)), n)
}

/// 2ˣ within 1 unit.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-151.0), s.min(s.splat(129.0), x));
    let n = s.round(x);
    let r = s.sub(x, n);
    let p = s.fma(r, s.splat(1.545_316_3e-4), s.splat(1.339_086_3e-3));
    let p = s.fma(p, r, s.splat(9.618_083e-3));
    let p = s.fma(p, r, s.splat(5.550_356_5e-2));
    let p = s.fma(p, r, s.splat(2.402_265e-1));
    let p = s.fma(p, r, s.splat(std::f32::consts::LN_2));
    s.scale(s.fma(p, r, s.splat(1.0)), n)
}

/// ln(1 + u) for 0 ≤ u < ∞ within 1 unit. What rounding 1 + u loses is put back to first order.
#[inline(always)]
fn ln_1p<S: Simd>(s: S, u: S::V) -> S::V {
    let one = s.splat(1.0);
    let w = s.add(one, u);
    let lost = s.div(s.sub(u, s.sub(w, one)), w);
    let (e, m) = s.split(w);
    let z = s.sub(m, one);
    let p = s.fma(z, s.splat(7.037_683_6e-2), s.splat(-1.151_461e-1));
    let p = s.fma(p, z, s.splat(1.167_699_9e-1));
    let p = s.fma(p, z, s.splat(-1.242_014_1e-1));
    let p = s.fma(p, z, s.splat(1.424_932_3e-1));
    let p = s.fma(p, z, s.splat(-1.666_805_8e-1));
    let p = s.fma(p, z, s.splat(2.000_071_5e-1));
    let p = s.fma(p, z, s.splat(-2.499_999_4e-1));
    let p = s.fma(p, z, s.splat(3.333_333e-1));
    let zz = s.mul(z, z);
    let small = s.fma(s.mul(zz, z), p, s.mul(e, s.splat(-LN_2_LESS)));
    let small = s.add(s.fma(zz, s.splat(-0.5), small), lost);
    s.fma(e, s.splat(LN_2_UPPER), s.add(z, small))
}

/// ln(1 + eˣ) within 1 unit, x beyond 20.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(s: S, x: S::V) -> S::V {
    // The clamp keeps the unused branch finite; a NaN passes.
    let soft = ln_1p(s, exp(s, s.min(s.splat(21.0), x)));
    s.if_greater(x, s.splat(20.0), x, soft)
}

/// The largest integer that is not above x, for |x| < 2²².
#[inline(always)]
pub(crate) fn floor<S: Simd>(s: S, x: S::V) -> S::V {
    let near = s.round(x);
    s.if_greater(near, x, s.sub(near, s.splat(1.0)), near)
}

/// 1 / (1 + e⁻ˣ) within 2 units.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// tanh x within 2 units: a polynomial around zero (of Cephes), 1 - 2 / (e²ˣ + 1) beyond.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let size = s.max(s.sub(zero, x), x);
    let z = s.mul(x, x);
    let p = s.fma(z, s.splat(-5.704_988_7e-3), s.splat(2.063_909e-2));
    let p = s.fma(p, z, s.splat(-5.373_971_6e-2));
    let p = s.fma(p, z, s.splat(1.333_144_2e-1));
    let p = s.fma(p, z, s.splat(-3.333_328e-1));
    let small = s.fma(s.mul(p, z), x, x);
    let large = s.div(s.splat(2.0), s.add(exp(s, s.add(size, size)), one));
    let large = s.sub(one, large);
    let large = s.if_greater(zero, x, s.sub(zero, large), large);
    s.if_greater(size, s.splat(0.625), large, small)
}

/// sin x and cos x within 1e-7, for |x| up to some turns: x = n · π/2 + r with |r| ≤ π/4 (Cody and
/// Waite; the polynomials of Cephes).
#[inline(always)]
pub(crate) fn sin_cos<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let (zero, one, quarter) = (s.splat(0.0), s.splat(1.0), s.splat(0.25));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::FRAC_2_PI)));
    // π/2 in three parts, the first two of few bits.
    let r = s.fma(n, s.splat(-1.570_312_5), x);
    let r = s.fma(n, s.splat(-4.837_513e-4), r);
    let r = s.fma(n, s.splat(-7.549_79e-8), r);
    let z = s.mul(r, r);
    let p = s.fma(z, s.splat(-1.951_529_6e-4), s.splat(8.332_161e-3));
    let p = s.fma(p, z, s.splat(-1.666_665_5e-1));
    let sin = s.fma(s.mul(p, z), r, r);
    let p = s.fma(z, s.splat(2.443_315_7e-5), s.splat(-1.388_731_6e-3));
    let p = s.fma(p, z, s.splat(4.166_664_6e-2));
    let cos = s.fma(s.mul(p, z), z, s.fma(z, s.splat(-0.5), one));
    // An odd n exchanges the two; the half turns in it change signs.
    let half = |n: S::V| s.round(s.fma(n, s.splat(0.5), s.sub(zero, quarter)));
    let is_odd = |n: S::V| s.fma(half(n), s.splat(-2.0), n);
    let (odd, turned) = (is_odd(n), is_odd(half(n)));
    let sign = s.fma(turned, s.splat(-2.0), one);
    let (a, b) = (
        s.if_greater(odd, quarter, cos, sin),
        s.if_greater(odd, quarter, s.sub(zero, sin), cos),
    );
    (s.mul(sign, a), s.mul(sign, b))
}

/// x · σ(x) within 2 units.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(x, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// The tanh form of GELU, as x · σ(2 · inner).
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let cube = s.mul(s.mul(s.mul(s.splat(0.044_715), x), x), x);
    let inner = s.mul(s.splat(-2.0 * 0.797_884_6), s.add(x, cube));
    s.div(x, s.add(s.splat(1.0), exp(s, inner)))
}

/// GELU by Abramowitz and Stegun 7.1.26 for the error function: within 3e-7 · |x|.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let at = s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let size = s.max(s.sub(zero, at), at);
    let t = s.div(one, s.fma(s.splat(0.327_591_1), size, one));
    let p = s.fma(t, s.splat(1.061_405_4), s.splat(-1.453_152));
    let p = s.fma(p, t, s.splat(1.421_413_7));
    let p = s.fma(p, t, s.splat(-0.284_496_74));
    let p = s.fma(p, t, s.splat(0.254_829_6));
    let tail = s.mul(s.mul(p, t), exp(s, s.sub(zero, s.mul(size, size))));
    // 1 + erf(at): the tail itself on the left, two less it on the right.
    let both = s.if_greater(zero, at, tail, s.sub(s.splat(2.0), tail));
    s.mul(s.mul(s.splat(0.5), x), both)
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, Kernel};
    use super::*;

    struct Apply<'a> {
        which: &'a str,
        x: &'a [f32],
        y: &'a mut [f32],
    }

    impl Kernel for Apply<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for (x, y) in self.x.iter().zip(self.y) {
                let v = s.splat(*x);
                let v = match self.which {
                    "exp" => exp(s, v),
                    "exp2" => exp2(s, v),
                    "softplus" => softplus(s, v),
                    "silu" => silu(s, v),
                    "gelu_tanh" => gelu_tanh(s, v),
                    "sigmoid" => sigmoid(s, v),
                    "tanh" => tanh(s, v),
                    "floor" => floor(s, v),
                    "sin" => sin_cos(s, v).0,
                    "cos" => sin_cos(s, v).1,
                    _ => gelu(s, v),
                };
                *y = s.largest(v);
                // `largest` looks past a NaN.
                if s.sum(v).is_nan() {
                    *y = f32::NAN;
                }
            }
        }
    }

    /// Numbers of every size and sign, and the special ones.
    fn points() -> Vec<f32> {
        let mut points: Vec<f32> = (0..=u32::MAX).step_by(20_011).map(f32::from_bits).collect();
        points.extend((-1_200_000..=1_200_000).map(|i| i as f32 * 1e-4));
        points.extend([
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1e-45,
            -1e-45,
        ]);
        points
    }

    #[test]
    fn functions_follow_f64_over_the_whole_range() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let points = points();
        let mut y = vec![0.0; points.len()];
        // Name, truth, units allowed. Where the truth is not normal, one unit of the smallest
        // number more; silu, sigmoid and gelu_tanh divide by a number that overflows first, below -87.
        type Case = (&'static str, Box<dyn Fn(f64) -> f64>, f64);
        let cases: [Case; 6] = [
            ("exp", Box::new(f64::exp), 1.0),
            ("exp2", Box::new(f64::exp2), 1.0),
            (
                "softplus",
                Box::new(|x| if x > 20.0 { x } else { x.exp().ln_1p() }),
                1.0,
            ),
            ("silu", Box::new(move |x| x * sigmoid(x)), 2.0),
            ("sigmoid", Box::new(sigmoid), 2.0),
            ("tanh", Box::new(f64::tanh), 2.0),
        ];
        for isa in Isa::available() {
            for (name, truth, allowed) in &cases {
                isa.launch(Apply {
                    which: name,
                    x: &points,
                    y: &mut y,
                });
                let mut worst = 0.0f64;
                for (&x, &y) in points.iter().zip(&y) {
                    let t = truth(f64::from(x));
                    if x.is_nan() || (t.is_nan() && x.is_infinite()) {
                        assert!(y.is_nan(), "{name}({x}) = {y} on {isa:?}");
                        continue;
                    }
                    if (t as f32).is_infinite()
                        || (matches!(*name, "silu" | "sigmoid") && x < -87.0)
                    {
                        assert!(
                            y == t as f32 || (x < 0.0 && y.abs() < 1e-35),
                            "{name}({x}) = {y}"
                        );
                        continue;
                    }
                    let unit =
                        (t.abs() * f64::from(f32::EPSILON)).max(f64::from(f32::from_bits(1)));
                    let units = (f64::from(y) - t).abs() / unit;
                    if units > worst {
                        worst = units;
                        assert!(units <= *allowed, "{name}({x}) = {y}, not {t}, on {isa:?}");
                    }
                }
                println!("{name} on {isa:?}: {worst:.2} units");
            }
        }
    }

    #[test]
    fn angles_follow_f64_over_some_turns() {
        let points: Vec<f32> = (-300_000..=300_000).map(|i| i as f32 * 1e-4).collect();
        let mut y = vec![0.0; points.len()];
        type Case = (&'static str, fn(f64) -> f64, f64);
        let cases: [Case; 3] = [
            ("sin", f64::sin, 1.2e-7),
            ("cos", f64::cos, 1.2e-7),
            ("floor", f64::floor, 0.0),
        ];
        for isa in Isa::available() {
            for (which, truth, allowed) in cases {
                isa.launch(Apply {
                    which,
                    x: &points,
                    y: &mut y,
                });
                let far = points
                    .iter()
                    .zip(&y)
                    .map(|(x, y)| (f64::from(*y) - truth(f64::from(*x))).abs());
                let worst = far.fold(0.0, f64::max);
                println!("{which} on {isa:?}: {worst:.2e}");
                assert!(worst <= allowed, "{which} on {isa:?}: {worst:.2e}");
            }
        }
    }

    #[test]
    fn gelus_follow_their_reference() {
        use crate::ops::Activation;
        let points: Vec<f32> = (-200_000..=200_000).map(|i| i as f32 * 1e-4).collect();
        let mut y = vec![0.0; points.len()];
        for isa in Isa::available() {
            for (which, act) in [
                ("gelu", Activation::Gelu),
                ("gelu_tanh", Activation::GeluTanh),
            ] {
                isa.launch(Apply {
                    which,
                    x: &points,
                    y: &mut y,
                });
                for (&x, &y) in points.iter().zip(&y) {
                    let expected = act.apply(x);
                    // The error function is within 1.5e-7 on both sides, tanh rounds near one.
                    let allowed = 4e-7 * x.abs() + 1e-12;
                    assert!(
                        (y - expected).abs() <= allowed,
                        "{which}({x}) = {y}, not {expected}"
                    );
                }
            }
        }
    }
}
