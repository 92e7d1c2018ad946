//! The CPU backend allocates nothing once its scratch memory has grown.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use strata_kernels::cpu::{Cpu, CpuOptions};
use strata_kernels::ops::{
    Attention, ExpertLinear, KvWrite, LayerNorm, Linear, RmsNorm, Rope, Route, S4dScan, Score,
    SelectiveScan, SsdChunked, SsdScan,
};
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix, Ragged, Span};

/// The system's allocator, counted.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn operations_allocate_nothing_after_the_first_time() {
    let cpu = Cpu::new(CpuOptions {
        threads: 3,
        isa: None,
    });
    let f32s = |rows, cols| {
        let mut tensor = cpu.alloc(DType::F32, rows, cols).unwrap();
        cpu.fill_normal(&mut tensor, 3, 0.1).unwrap();
        tensor
    };
    let bf16 = |rows, cols| {
        let mut tensor = cpu.alloc(DType::BF16, rows, cols).unwrap();
        cpu.fill_normal(&mut tensor, 4, 0.1).unwrap();
        Matrix::dense(tensor)
    };
    let (rows, d, n) = (600, 128, 16);
    let (x, mut y, mut z) = (f32s(rows, d), f32s(rows, d), f32s(2 * rows, d));
    let (a, b, vector) = (f32s(n, d), f32s(rows, n), f32s(1, d));
    let (w, experts) = (bf16(d, d), [bf16(d, d), bf16(d, d)]);
    let blocks = |format: Format| {
        let values: Vec<f32> = (0..2 * d * d).map(|i| (i % 29) as f32 - 14.0).collect();
        let mut bytes = vec![0; format.bytes_of(&[d, 2 * d]).unwrap()];
        format.quantize(&values, None, &mut bytes).unwrap();
        let range = 0..bytes.len();
        let host = HostTensor::new(format, &[d, 2 * d], std::sync::Arc::new(bytes), range).unwrap();
        Matrix::new(format, 2 * d, cpu.upload(&host, d, 2 * d).unwrap())
    };
    let in_blocks = [blocks(Format::Q8_0), blocks(Format::Q4K)];
    let wide = f32s(rows, 2 * d);
    let mut chosen = cpu.alloc(DType::I32, rows, 2).unwrap();
    cpu.write(
        &(0..2 * rows).map(|i| (i % 2) as f32).collect::<Vec<_>>(),
        &mut chosen,
    )
    .unwrap();
    let mut routed = cpu.alloc(DType::I32, rows, 2).unwrap();
    let (mut weights, heads) = (f32s(rows, 2), f32s(1, n));
    let mut state = f32s(1, n * d);
    let (mut ssd_state, mut s4d_state) = (f32s(1, n / 2 * d), f32s(1, 2 * n * d));
    let chunk_size = 48;
    let mut of_chunk = [d, n, n].map(|cols| f32s(1, chunk_size * cols));
    let (mut k_pages, mut v_pages) = (f32s(rows, d), f32s(rows, d));
    let spans = [Span {
        start: 0,
        len: rows,
        position: 0,
        slot: 0,
        pages: 0..rows,
    }];
    let page_table: Vec<u32> = (0..rows as u32).collect();
    let ragged = Ragged {
        spans: &spans,
        page_table: &page_table,
        page_size: 1,
    };
    let frequencies = f32s(1, 8);
    let mut all = || {
        for activations in [DType::BF16, DType::F32] {
            let op = Linear {
                x: &x,
                w: &w,
                bias: Some(&vector),
                activations,
                y: &mut y,
            };
            cpu.linear(op).unwrap();
            for w in &in_blocks {
                let op = Linear {
                    x: &wide,
                    w,
                    bias: None,
                    activations,
                    y: &mut y,
                };
                cpu.linear(op).unwrap();
            }
            let op = ExpertLinear {
                x: &wide,
                w: &in_blocks,
                experts: &chosen,
                activations,
                y: &mut z,
            };
            cpu.expert_linear(op).unwrap();
            let (w, experts) = (&experts, &chosen);
            cpu.expert_linear(ExpertLinear {
                x: &x,
                w,
                experts,
                activations,
                y: &mut z,
            })
            .unwrap();
        }
        let op = SelectiveScan {
            x: &x,
            dt: &x,
            dt_bias: None,
            a: &a,
            b: &b,
            c: &b,
            groups: 1,
            d: &vector,
            z: Some(&x),
            ssm_state: &mut state,
            ragged,
            y: &mut y,
        };
        cpu.selective_scan(op).unwrap();
        let (x, vector) = (&x, &vector);
        cpu.ssd_scan(SsdScan {
            x,
            dt: &b,
            dt_bias: None,
            dt_limit: (0.0, f32::INFINITY),
            a: &heads,
            b: &b,
            c: &b,
            d: None,
            scale_input: true,
            groups: 2,
            ssm_state: &mut ssd_state,
            ragged,
            y: &mut y,
        })
        .unwrap();
        let [chunk_inputs, chunk_b, chunk_decays] = &mut of_chunk;
        cpu.ssd_chunked(SsdChunked {
            scan: SsdScan {
                x,
                dt: &b,
                dt_bias: None,
                dt_limit: (0.0, f32::INFINITY),
                a: &heads,
                b: &b,
                c: &b,
                d: None,
                scale_input: true,
                groups: 2,
                ssm_state: &mut ssd_state,
                ragged,
                y: &mut y,
            },
            chunk_size,
            chunk_inputs,
            chunk_b,
            chunk_decays,
        })
        .unwrap();
        cpu.s4d_scan(S4dScan {
            x,
            a_re: &a,
            a_im: &a,
            c_re: &a,
            c_im: &a,
            d: vector,
            ssm_state: &mut s4d_state,
            ragged,
            y: &mut y,
        })
        .unwrap();
        let (eps, groups) = (1e-6, 4);
        cpu.rms_norm(RmsNorm {
            x,
            weight: Some(vector),
            eps,
            groups,
            y: &mut y,
        })
        .unwrap();
        cpu.layer_norm(LayerNorm {
            x,
            weight: Some(vector),
            bias: Some(vector),
            eps,
            groups,
            y: &mut y,
        })
        .unwrap();
        let op = Route {
            logits: x,
            score: Score::Sigmoid,
            choice_bias: Some(vector),
            groups: Some((8, 2)),
            normalize: true,
            scale: 2.0,
            experts: &mut routed,
            weights: &mut weights,
        };
        cpu.route(op).unwrap();
        let frequencies = &frequencies;
        let op = Rope {
            x: &mut y,
            head_dim: 16,
            frequencies,
            interleaved: false,
            scale: 1.0,
            ragged,
        };
        cpu.rope(op).unwrap();
        let (pages_k, pages_v) = (&mut k_pages, &mut v_pages);
        let op = KvWrite {
            k: x,
            v: x,
            k_pages: pages_k,
            v_pages: pages_v,
            kv_heads: 8,
            ragged,
        };
        cpu.kv_write(op).unwrap();
        for (window, keep_first) in [(None, 0), (Some(50), 3)] {
            let op = Attention {
                q: x,
                k_pages: &k_pages,
                v_pages: &v_pages,
                heads: 8,
                kv_heads: 8,
                head_dim: 16,
                v_head_dim: 16,
                scale: 0.25,
                window,
                keep_first,
                ragged,
                y: &mut y,
            };
            cpu.attention(op).unwrap();
        }
    };
    // A worker may not get a part of every operation at first, so quiet rounds are looked for.
    let quiet = (0..200).any(|_| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        (0..5).for_each(|_| all());
        ALLOCATIONS.load(Ordering::Relaxed) == before
    });
    assert!(quiet, "every round allocates");
}
