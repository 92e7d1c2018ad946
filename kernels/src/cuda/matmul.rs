//! Products on matrix units, by cuBLASLt: BF16 inputs, f32 sums and results. A plan, which algorithm
//! runs a shape, is asked for once.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::device::{Allocation, Device};
use super::{fault, locate};
use crate::error::Result;

/// What algorithms may use beside their inputs: what NVIDIA advises for this generation.
const WORKSPACE: usize = 32 << 20;
/// Plans that are kept. A prompt's last chunk may have any number of rows.
const PLANS: usize = 4096;

/// A shape: y (m, n) = x (m, k) · w (n, k)ᵀ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Whether x and w are whole numbers of eight bits and y of 32; else x and w are BF16 and y is f32.
    pub integers: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Elements from row to row of x, and of y.
    pub x_stride: usize,
    pub y_stride: usize,
    /// Bytes that the addresses of w and of y are multiples of, at most 256. Those of x are.
    pub w_align: u32,
    pub y_align: u32,
}

/// The greatest power of two up to 256 that an address is a multiple of.
pub(super) fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

struct Plan {
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in [self.w, self.x, self.y] {
            // SAFETY: made with the plan, destroyed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
    }
}

/// The library, with its plans.
pub(super) struct Matmul {
    handle: sys::cublasLtHandle_t,
    /// Of floats, and of whole numbers.
    descriptions: [sys::cublasLtMatmulDesc_t; 2],
    workspace: Allocation,
    /// None where the library has no algorithm.
    plans: HashMap<Shape, Option<Plan>>,
    device: Arc<Device>,
}

// SAFETY: the library's handles may be used from any thread.
unsafe impl Send for Matmul {}

fn failed(what: &str) -> impl Fn(CublasError) -> crate::Error + '_ {
    move |e| fault(format!("cuBLASLt: {what} failed, {:?}", e.0))
}

impl Matmul {
    pub fn new(device: &Arc<Device>, folders: &[PathBuf]) -> Result<Self> {
        locate::products(folders)?;
        let handle = result::create_handle().map_err(failed("its start"))?;
        let describe = |sums, scale| {
            let description = result::create_matmul_desc(sums, scale);
            let description = description.map_err(failed("a description"))?;
            let transposed: i32 = 1; // CUBLAS_OP_T
            // SAFETY: the description is alive, and the value is what this attribute is.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                    (&raw const transposed).cast(),
                    size_of_val(&transposed),
                )
            }
            .map_err(failed("a description"))?;
            Ok(description)
        };
        Ok(Matmul {
            handle,
            descriptions: [
                describe(
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    sys::cudaDataType_t::CUDA_R_32F,
                )?,
                describe(
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32I,
                    sys::cudaDataType_t::CUDA_R_32I,
                )?,
            ],
            workspace: Allocation::new(device, WORKSPACE)?,
            plans: HashMap::new(),
            device: device.clone(),
        })
    }

    /// y = x · wᵀ for addresses of x, w and y; false when there is no algorithm for the shape.
    pub fn run(&mut self, shape: Shape, x: u64, w: u64, y: u64) -> Result<bool> {
        if !self.plans.contains_key(&shape) {
            if self.plans.len() >= PLANS {
                self.plans.clear();
            }
            let plan = self.plan(&shape)?;
            self.plans.insert(shape, plan);
        }
        let Some(Some(plan)) = self.plans.get(&shape) else {
            return Ok(false);
        };
        // One and zero, in the type of the sums.
        let one = if shape.integers { 1 } else { 1.0f32.to_bits() };
        let zero = 0u32;
        // SAFETY: layouts and tensors agree, which `Linear::check` has seen to; memory outlives the
        // stream's work.
        unsafe {
            result::matmul(
                self.handle,
                self.descriptions[usize::from(shape.integers)],
                (&raw const one).cast(),
                (&raw const zero).cast(),
                w as *const _,
                plan.w,
                x as *const _,
                plan.x,
                y as *const _,
                plan.y,
                y as *mut _,
                plan.y,
                &raw const plan.algorithm,
                self.workspace.pointer as *mut _,
                WORKSPACE,
                self.device.work().cast(),
            )
        }
        .map_err(failed("a product"))?;
        Ok(true)
    }

    /// The library takes columns one after the other: rows of ours are its columns.
    fn plan(&self, s: &Shape) -> Result<Option<Plan>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        use sys::cudaDataType_t::{CUDA_R_8I, CUDA_R_16BF, CUDA_R_32F, CUDA_R_32I};
        let (of, sums) = if s.integers {
            (CUDA_R_8I, CUDA_R_32I)
        } else {
            (CUDA_R_16BF, CUDA_R_32F)
        };
        let layout = |dtype, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64)
                .map_err(failed("a layout"))
        };
        let mut plan = Plan {
            w: layout(of, s.k, s.n, s.k)?,
            x: layout(of, s.k, s.m, s.x_stride)?,
            y: layout(sums, s.n, s.m, s.y_stride)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let preference = result::create_matmul_pref().map_err(failed("a preference"))?;
        let workspace = WORKSPACE as u64;
        let aligned = [
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                s.w_align,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                s.y_align,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                s.y_align,
            ),
        ];
        // SAFETY: the preference is alive, and the values are what these attributes are; the layouts
        // are alive.
        let found = unsafe {
            let set = |attribute, value: *const std::ffi::c_void, size| {
                result::set_matmul_pref_attribute(preference, attribute, value, size)
            };
            let mut all = set(
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                8,
            );
            for (attribute, bytes) in &aligned {
                all = all.and(set(*attribute, std::ptr::from_ref(bytes).cast(), 4));
            }
            let found = all.and_then(|()| {
                result::get_matmul_algo_heuristic(
                    self.handle,
                    self.descriptions[usize::from(s.integers)],
                    plan.w,
                    plan.x,
                    plan.y,
                    plan.y,
                    preference,
                )
            });
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        match found {
            Ok(found) => {
                plan.algorithm = found.algo;
                Ok(Some(plan))
            }
            Err(e) if e.0 == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => Ok(None),
            Err(e) => Err(failed("the choice of an algorithm")(e)),
        }
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        self.plans.clear();
        if self.device.enter().is_ok() {
            let _ = self.device.synchronize();
            // SAFETY: made in `new`, destroyed once, after the last work.
            unsafe {
                for description in self.descriptions {
                    let _ = result::destroy_matmul_desc(description);
                }
                let _ = result::destroy_handle(self.handle);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::alignment;

    #[test]
    fn alignments_are_powers_of_two_up_to_256() {
        assert_eq!(
            [0, 1 << 30, 768, 48, 6].map(alignment),
            [256, 256, 256, 16, 2]
        );
    }
}
