//! How fast each operation of the CPU backend is, beside what the machine can do at most.
//!
//! ```text
//! cargo run --release -p strata-kernels --example ops [threads] [part of a name] [instruction set]
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use strata_kernels::cpu::{Cpu, CpuOptions, Isa, Limits, measure};
use strata_kernels::ops::{
    Activate, Activation, Add, Attention, Conv1d, Embed, ExpertLinear, KvWrite, LayerNorm, Linear,
    RmsNorm, Rope, S4dScan, SelectiveScan, SsdChunked, SsdScan,
};
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix, Ragged, Span, Tensor};

struct Bench {
    cpu: Cpu,
    limits: Limits,
    only: String,
}

/// What a call does, for rates.
#[derive(Clone, Copy)]
enum Work {
    /// Bytes that must come from memory.
    Bytes(usize),
    /// Operations on BF16, or f32.
    Bf16(usize),
    F32(usize),
    /// Things of another kind, in 10⁹.
    Count(usize, &'static str),
}

impl Bench {
    fn time(&self, name: &str, work: Work, f: impl FnMut()) {
        self.time_each(name, 1, work, f);
    }

    /// The same of something that is done `calls` times by `f`; `work` is of once.
    fn time_each(&self, name: &str, calls: usize, work: Work, mut f: impl FnMut()) {
        if !name.contains(&self.only) {
            return;
        }
        f();
        let (mut times, start) = (Vec::new(), Instant::now());
        while times.len() < 5 || (start.elapsed() < Duration::from_millis(400) && times.len() < 500)
        {
            let start = Instant::now();
            f();
            times.push(start.elapsed().as_secs_f64() / calls as f64);
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let (n, unit, limit) = match work {
            Work::Bytes(n) => (n, "GB/s", Some(self.limits.read_bytes_per_second)),
            Work::Bf16(n) => (n, "GFLOP/s", Some(self.limits.bf16_flops_per_second)),
            Work::F32(n) => (n, "GFLOP/s", Some(self.limits.f32_flops_per_second)),
            Work::Count(n, unit) => (n, unit, None),
        };
        let rate = n as f64 / seconds;
        let best = n as f64 / times[0] / 1e9;
        let percent = limit.map_or(String::new(), |limit| {
            format!("{:5.1} %", 100.0 * rate / limit)
        });
        println!(
            "{name:52} {:10.1} us {:9.2} {unit:12} {percent:8} (best {best:.2})",
            seconds * 1e6,
            rate / 1e9
        );
    }

    fn random(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let mut tensor = self.cpu.alloc(dtype, rows, cols).expect("memory");
        self.cpu.fill_normal(&mut tensor, 1, 0.5).expect("a fill");
        tensor
    }

    fn linear(&self, t: usize, n: usize, k: usize, weight: DType, activations: DType) {
        // More than the caches hold, taken in turn.
        let one = n * k * weight.size();
        let copies = if t <= 16 && one > 1 << 20 {
            (256usize << 20).div_ceil(one)
        } else {
            1
        };
        let name = format!("linear {t} × {k} → {n}, {weight} × {activations}");
        if !name.contains(&self.only) {
            return;
        }
        let w: Vec<Matrix> = (0..copies)
            .map(|_| Matrix::dense(self.random(weight, n, k)))
            .collect();
        let (x, mut y) = (self.random(DType::F32, t, k), self.random(DType::F32, t, n));
        let work = match (t <= 16, activations, weight) {
            (true, ..) => Work::Bytes(one),
            (_, DType::BF16, DType::BF16) => Work::Bf16(2 * t * n * k),
            _ => Work::F32(2 * t * n * k),
        };
        let mut i = 0;
        self.time(&name, work, || {
            i += 1;
            let w = &w[i % copies];
            let op = Linear {
                x: &x,
                w,
                bias: None,
                activations,
                y: &mut y,
            };
            self.cpu.linear(op).expect("a product");
        });
    }

    /// A product with a weight in blocks, inputs rounded to bytes.
    fn linear_in_blocks(&self, t: usize, n: usize, k: usize, format: Format) {
        let name = format!("linear {t} × {k} → {n}, {format}");
        if !name.contains(&self.only) {
            return;
        }
        let bytes = format.bytes_of(&[n, k]).expect("whole blocks");
        // Small ones stay in a cache, and show what unpacking costs.
        let copies = if t <= 16 && bytes > 1 << 20 {
            (256usize << 20).div_ceil(bytes)
        } else {
            1
        };
        // Some rows, in turn: what they hold makes no difference.
        let rows: Vec<Vec<u8>> = (0..8)
            .map(|r| {
                let row = strata_kernels::random::normal_row(1, r, k, 0.5);
                let mut to = vec![0; bytes / n];
                format
                    .quantize(&row, None, &mut to)
                    .expect("finite numbers");
                to
            })
            .collect();
        let w: Vec<Matrix> = (0..copies)
            .map(|_| {
                let all: Vec<u8> = (0..n).flat_map(|r| rows[r % 8].iter().copied()).collect();
                let host = HostTensor::new(format, &[n, k], Arc::new(all), 0..bytes);
                let data = self.cpu.upload(&host.expect("whole rows"), n, k);
                Matrix::new(format, k, data.expect("memory"))
            })
            .collect();
        let (x, mut y) = (self.random(DType::F32, t, k), self.random(DType::F32, t, n));
        let work = if t <= 16 {
            Work::Bytes(bytes)
        } else {
            Work::Bf16(2 * t * n * k)
        };
        let mut i = 0;
        self.time(&name, work, || {
            i += 1;
            let op = Linear {
                x: &x,
                w: &w[i % copies],
                bias: None,
                activations: DType::BF16,
                y: &mut y,
            };
            self.cpu.linear(op).expect("a product");
        });
    }

    fn experts(&self, t: usize, n: usize, k: usize) {
        let w: Vec<Matrix> = (0..16)
            .map(|_| Matrix::dense(self.random(DType::BF16, n, k)))
            .collect();
        let (x, mut y) = (
            self.random(DType::F32, t, k),
            self.random(DType::F32, 2 * t, n),
        );
        let mut experts = self.cpu.alloc(DType::I32, t, 2).expect("memory");
        let chosen: Vec<f32> = (0..t)
            .flat_map(|t| [t % 16, (t * 7 + 3) % 16])
            .map(|e| e as f32)
            .collect();
        self.cpu.write(&chosen, &mut experts).expect("a write");
        let work = if t == 1 {
            Work::Bytes(2 * n * k * 2)
        } else {
            Work::Bf16(2 * 2 * t * n * k)
        };
        self.time(
            &format!("expert_linear {t} × {k} → {n}, 2 of 16"),
            work,
            || {
                let activations = DType::BF16;
                let op = ExpertLinear {
                    x: &x,
                    w: &w,
                    experts: &experts,
                    activations,
                    y: &mut y,
                };
                self.cpu.expert_linear(op).expect("a product");
            },
        );
    }

    fn mamba(&self, t: usize, inner: usize, states: usize) {
        let r = |rows, cols| self.random(DType::F32, rows, cols);
        let (x, dt, z, mut y) = (r(t, inner), r(t, inner), r(t, inner), r(t, inner));
        let (a, b, c, d) = (r(states, inner), r(t, states), r(t, states), r(1, inner));
        let mut rates = vec![0.0; states * inner];
        self.cpu.read(&a, &mut rates).expect("a read");
        rates.iter_mut().for_each(|a| *a = -a.abs());
        let mut a = a;
        self.cpu.write(&rates, &mut a).expect("a write");
        let spans = [Span {
            start: 0,
            len: t,
            position: 0,
            slot: 0,
            pages: 0..0,
        }];
        let ragged = Ragged {
            spans: &spans,
            page_table: &[],
            page_size: 1,
        };
        let mut state = r(1, states * inner);
        let work = Work::Count(t * inner * states, "G states/s");
        self.time(
            &format!("selective_scan {t} × {inner} × {states}"),
            work,
            || {
                let op = SelectiveScan {
                    x: &x,
                    dt: &dt,
                    dt_bias: Some(&d),
                    a: &a,
                    b: &b,
                    c: &c,
                    groups: 1,
                    d: &d,
                    z: Some(&z),
                    ssm_state: &mut state,
                    ragged,
                    y: &mut y,
                };
                self.cpu.selective_scan(op).expect("a scan");
            },
        );
        let (w, mut state) = (r(4, inner), r(1, 3 * inner));
        let work = Work::Bytes(8 * t * inner);
        self.time(&format!("conv1d {t} × {inner}, 4 taps"), work, || {
            let op = Conv1d {
                x: &x,
                w: &w,
                bias: Some(&d),
                act: Activation::Silu,
                conv_state: &mut state,
                ragged,
                y: &mut y,
            };
            self.cpu.conv1d(op).expect("a convolution");
        });
    }

    /// `t` rows of each of `spans` sequences; `shape` is heads, groups, width of a head, states. By chunks
    /// of so many tokens if there is a `chunk`; single rows are then means over a chunk.
    fn ssd(
        &self,
        (spans, t): (usize, usize),
        shape: (usize, usize, usize, usize),
        chunk: Option<usize>,
    ) {
        let (heads, groups, width, states) = shape;
        let form = match chunk {
            None => "ssd_scan".to_string(),
            Some(size) => format!("ssd_chunked {size}:"),
        };
        let name = format!("{form} {spans} × {t}, {heads}/{groups} × {width} × {states}");
        if !name.contains(&self.only) {
            return;
        }
        let rows = spans * t;
        let r = |rows, cols| self.random(DType::F32, rows, cols);
        // As a model has them: b and c lie beside x.
        let (inner, of_b) = (heads * width, groups * states);
        let xbc = r(rows, inner + 2 * of_b);
        let x = xbc.columns(0..inner);
        let b = xbc.columns(inner..inner + of_b);
        let c = xbc.columns(inner + of_b..inner + 2 * of_b);
        let (dt, d, mut y) = (r(rows, heads), r(1, heads), r(rows, inner));
        let mut a = r(1, heads);
        let mut rates = vec![0.0; heads];
        self.cpu.read(&a, &mut rates).expect("a read");
        rates.iter_mut().for_each(|a| *a = -a.abs());
        self.cpu.write(&rates, &mut a).expect("a write");
        // Where states are all that is read, more than the caches hold, taken in turn.
        let turns = if t == 1 {
            (256usize << 20).div_ceil(4 * spans * inner * states)
        } else {
            1
        };
        let slots = turns * spans;
        let mut state = r(slots, inner * states);
        let size = chunk.unwrap_or(0);
        let mut kept = [inner, of_b, heads].map(|n| r(slots, n * size));
        let mut spans: Vec<Span> = (0..spans)
            .map(|slot| Span {
                start: slot * t,
                len: t,
                position: 0,
                slot,
                pages: 0..0,
            })
            .collect();
        // The recurrence: a token alone reads and writes the state once; many do six operations for each
        // of it, which is three instructions, one of them a product without a sum. By chunks: a token
        // alone reads the state and half a chunk, and one of a chunk's writes the state; many multiply
        // twice with the state and once with half a chunk.
        let (of_state, half) = (inner * states, (size + 1) * (inner + of_b) / 2);
        let work = match (chunk, t) {
            (None, 1) => Work::Bytes(8 * rows * of_state),
            (None, _) => Work::F32(6 * rows * of_state),
            (Some(_), 1) => Work::Bytes(4 * rows * (of_state + half + 2 * of_state / size)),
            (Some(_), _) => Work::F32(2 * rows * (2 * of_state + half)),
        };
        let calls = if t == 1 { size.max(1) } else { 1 };
        self.time_each(&name, calls, work, || {
            for position in 0..calls {
                for span in &mut spans {
                    span.position = position;
                    span.slot = (span.slot + slots / turns) % slots;
                }
                let ragged = Ragged {
                    spans: &spans,
                    page_table: &[],
                    page_size: 1,
                };
                let scan = SsdScan {
                    x: &x,
                    dt: &dt,
                    dt_bias: Some(&d),
                    dt_limit: (0.0, f32::INFINITY),
                    a: &a,
                    b: &b,
                    c: &c,
                    d: Some(&d),
                    scale_input: true,
                    groups,
                    ssm_state: &mut state,
                    ragged,
                    y: &mut y,
                };
                if chunk.is_none() {
                    self.cpu.ssd_scan(scan).expect("a scan");
                    continue;
                }
                let [chunk_inputs, chunk_b, chunk_decays] = &mut kept;
                let op = SsdChunked {
                    scan,
                    chunk_size: size,
                    chunk_inputs,
                    chunk_b,
                    chunk_decays,
                };
                self.cpu.ssd_chunked(op).expect("a scan");
            }
        });
    }

    fn s4d(&self, t: usize, inner: usize, states: usize) {
        let r = |rows, cols| self.random(DType::F32, rows, cols);
        let (x, d, mut y) = (r(t, inner), r(1, inner), r(t, inner));
        let (mut a, c) = (r(states, inner), r(states, inner));
        let half = vec![0.6; states * inner];
        self.cpu.write(&half, &mut a).expect("a write");
        let mut state = r(1, 2 * states * inner);
        let spans = [Span {
            start: 0,
            len: t,
            position: 0,
            slot: 0,
            pages: 0..0,
        }];
        let ragged = Ragged {
            spans: &spans,
            page_table: &[],
            page_size: 1,
        };
        // A token alone reads four numbers of the layer for each state, and reads and writes the state.
        let work = if t == 1 {
            Work::Bytes(32 * inner * states)
        } else {
            Work::F32(12 * t * inner * states)
        };
        self.time(
            &format!("s4d_scan {t} × {inner} × {states}"),
            work,
            || {
                let op = S4dScan {
                    x: &x,
                    a_re: &a,
                    a_im: &a,
                    c_re: &c,
                    c_im: &c,
                    d: &d,
                    ssm_state: &mut state,
                    ragged,
                    y: &mut y,
                };
                self.cpu.s4d_scan(op).expect("a scan");
            },
        );
    }

    fn attention(&self, t: usize, before: usize, heads: (usize, usize), dim: usize, pages: DType) {
        let length = before + t;
        let q = self.random(DType::F32, t, heads.0 * dim);
        let k_pages = self.random(pages, length.next_multiple_of(16), heads.1 * dim);
        let v_pages = self.random(pages, length.next_multiple_of(16), heads.1 * dim);
        let page_table: Vec<u32> = (0..length.div_ceil(16) as u32).collect();
        let span = Span {
            start: 0,
            len: t,
            position: before,
            slot: 0,
            pages: 0..page_table.len(),
        };
        let spans = [span];
        let ragged = Ragged {
            spans: &spans,
            page_table: &page_table,
            page_size: 16,
        };
        let mut y = self.random(DType::F32, t, heads.0 * dim);
        let work = if t == 1 {
            Work::Bytes(2 * length * heads.1 * dim * pages.size())
        } else {
            Work::F32(4 * heads.0 * dim * (t * before + t * (t + 1) / 2))
        };
        let name = format!(
            "attention {t} after {before}, {}/{} × {dim}, {pages}",
            heads.0, heads.1
        );
        self.time(&name, work, || {
            let op = Attention {
                q: &q,
                k_pages: &k_pages,
                v_pages: &v_pages,
                heads: heads.0,
                kv_heads: heads.1,
                head_dim: dim,
                v_head_dim: dim,
                scale: 0.1,
                window: None,
                keep_first: 0,
                ragged,
                y: &mut y,
            };
            self.cpu.attention(op).expect("attention");
        });
    }

    fn rows(&self, t: usize, d: usize) {
        let r = |rows, cols| self.random(DType::F32, rows, cols);
        let (a, b, w, mut y) = (r(t, d), r(t, d), r(1, d), r(t, d));
        let of = |op: &str| format!("{op} {t} × {d}");
        self.time(&of("rms_norm"), Work::Bytes(8 * t * d), || {
            let op = RmsNorm {
                x: &a,
                weight: Some(&w),
                eps: 1e-6,
                groups: 1,
                y: &mut y,
            };
            self.cpu.rms_norm(op).expect("a norm");
        });
        self.time(&of("rms_norm of 8 parts"), Work::Bytes(8 * t * d), || {
            let op = RmsNorm {
                x: &a,
                weight: Some(&w),
                eps: 1e-6,
                groups: 8,
                y: &mut y,
            };
            self.cpu.rms_norm(op).expect("a norm");
        });
        self.time(&of("layer_norm"), Work::Bytes(8 * t * d), || {
            let op = LayerNorm {
                x: &a,
                weight: Some(&w),
                bias: Some(&w),
                eps: 1e-6,
                groups: 1,
                y: &mut y,
            };
            self.cpu.layer_norm(op).expect("a norm");
        });
        self.time(&of("add"), Work::Bytes(12 * t * d), || {
            self.cpu
                .add(Add {
                    a: &a,
                    b: &b,
                    y: &mut y,
                })
                .expect("a sum");
        });
        self.time(&of("activate gated silu"), Work::Bytes(12 * t * d), || {
            let op = Activate {
                x: &a,
                gate: Some(&b),
                act: Activation::Silu,
                y: &mut y,
            };
            self.cpu.activate(op).expect("an activation");
        });
        let frequencies = r(1, 32);
        let page_table: Vec<u32> = (0..t.div_ceil(16) as u32).collect();
        let spans = [Span {
            start: 0,
            len: t,
            position: 0,
            slot: 0,
            pages: 0..page_table.len(),
        }];
        let ragged = Ragged {
            spans: &spans,
            page_table: &page_table,
            page_size: 16,
        };
        self.time(&of("rope"), Work::Bytes(8 * t * d), || {
            let frequencies = &frequencies;
            let op = Rope {
                x: &mut y,
                head_dim: 64,
                frequencies,
                interleaved: false,
                scale: 1.0,
                ragged,
            };
            self.cpu.rope(op).expect("a rotation");
        });
        let pages = || self.random(DType::BF16, t.next_multiple_of(16), d);
        let (mut k_pages, mut v_pages) = (pages(), pages());
        self.time(&of("kv_write"), Work::Bytes(12 * t * d), || {
            let (k_pages, v_pages) = (&mut k_pages, &mut v_pages);
            self.cpu
                .kv_write(KvWrite {
                    k: &a,
                    v: &b,
                    k_pages,
                    v_pages,
                    kv_heads: 1,
                    ragged,
                })
                .expect("a write");
        });
        let table = Matrix::dense(self.random(DType::BF16, 65_536, d));
        let ids: Vec<u32> = (0..t as u32).map(|t| t * 127 % 65_536).collect();
        self.time(&of("embed"), Work::Bytes(6 * t * d), || {
            self.cpu
                .embed(Embed {
                    ids: &ids,
                    table: &table,
                    y: &mut y,
                })
                .expect("a lookup");
        });
    }

    fn memory(&self) {
        let (rows, cols) = (16_384, 4096);
        let (from, mut to) = (
            self.random(DType::BF16, rows, cols),
            self.random(DType::BF16, rows, cols),
        );
        self.time("copy 128 MiB", Work::Bytes(4 * rows * cols), || {
            self.cpu.copy(&from, &mut to).expect("a copy");
        });
        self.time("clear 128 MiB", Work::Bytes(2 * rows * cols), || {
            self.cpu.clear(&mut to).expect("zeros");
        });
        self.time(
            "fill_normal BF16",
            Work::Count(rows * cols, "G values/s"),
            || {
                self.cpu.fill_normal(&mut to, 7, 0.02).expect("a fill");
            },
        );
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments
        .next()
        .map_or(0, |a| a.parse().expect("a number of threads"));
    let only = arguments.next().unwrap_or_default();
    let isa = arguments.next().map(|name| {
        let isa = Isa::available().into_iter().find(|isa| isa.name() == name);
        isa.unwrap_or_else(|| panic!("{name} is not among {:?}", Isa::available()))
    });
    let cpu = Cpu::new(CpuOptions { threads, isa });
    let limits = measure(&cpu);
    println!(
        "{cpu:?}: {:.1} GB/s, {:.0} GFLOP/s BF16, {:.0} GFLOP/s F32",
        limits.read_bytes_per_second / 1e9,
        limits.bf16_flops_per_second / 1e9,
        limits.f32_flops_per_second / 1e9,
    );
    let b = Bench { cpu, limits, only };
    use DType::{BF16, F16, F32};
    for (n, k) in [(10_240, 2560), (2560, 5120), (2560, 8192), (288, 5120)] {
        b.linear(1, n, k, BF16, BF16);
        b.linear(1, n, k, BF16, F32);
    }
    // So small that sharing it out is most of the time.
    b.linear(1, 256, 64, BF16, BF16);
    b.linear(1, 10_240, 2560, F32, F32);
    b.linear(1, 10_240, 2560, F16, F32);
    for t in [2, 4, 8, 16] {
        b.linear(t, 10_240, 2560, BF16, BF16);
        b.linear(t, 10_240, 2560, BF16, F32);
    }
    for t in [32, 128, 512] {
        b.linear(t, 10_240, 2560, BF16, BF16);
    }
    for (n, k) in [
        (2560, 5120),
        (2560, 8192),
        (288, 5120),
        (5120, 160),
        (3352, 768),
        (768, 1536),
    ] {
        b.linear(512, n, k, BF16, BF16);
    }
    // Beside BF16: percentages of its peak can pass a hundred, since products of bytes are faster.
    for format in Format::ALL.into_iter().filter(|f| f.dtype().is_none()) {
        for t in [1, 2, 3, 4, 8] {
            b.linear_in_blocks(t, 256, 2560, format);
        }
        for t in [1, 2, 4, 8, 512] {
            b.linear_in_blocks(t, 8192, 2560, format);
            b.linear_in_blocks(t, 2560, 8192, format);
        }
    }
    b.linear(512, 2560, 5120, BF16, F32);
    b.linear(512, 2560, 5120, F32, F32);
    b.experts(1, 4096, 1024);
    b.experts(256, 4096, 1024);
    b.mamba(512, 5120, 16);
    b.mamba(1, 5120, 16);
    b.mamba(512, 512, 16);
    b.mamba(512, 512, 64);
    b.mamba(256, 1536, 64);
    for shape in [
        (64, 1, 64, 128),
        (24, 1, 64, 256),
        (32, 1, 80, 64),
        (50, 1, 128, 64),
    ] {
        b.ssd((1, 512), shape, None);
        b.ssd((1, 1), shape, None);
    }
    b.ssd((8, 4), (128, 8, 64, 128), None);
    // Both forms.
    for shape in [(24, 1, 64, 128), (128, 8, 64, 128), (48, 1, 64, 64)] {
        for batch in [(1, 512), (1, 1), (8, 1)] {
            for chunk in [None, Some(32), Some(64), Some(128), Some(256)] {
                b.ssd(batch, shape, chunk);
            }
        }
    }
    b.s4d(512, 2048, 32);
    b.s4d(1, 2048, 32);
    b.attention(1, 4095, (20, 1), 128, BF16);
    b.attention(1, 32_767, (20, 1), 128, BF16);
    b.attention(1, 8191, (8, 8), 64, BF16);
    b.attention(1, 8191, (32, 8), 128, F32);
    b.attention(512, 0, (20, 1), 128, BF16);
    b.attention(512, 3584, (20, 1), 128, BF16);
    b.attention(512, 0, (32, 8), 64, F32);
    b.rows(1, 2560);
    b.rows(512, 2560);
    b.memory();
}
