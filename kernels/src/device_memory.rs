//! Memory of devices, as tensors hold it.

use std::any::Any;

/// Memory of a device that host code cannot reach, for as long as it is held.
pub(crate) trait DeviceMemory: Send + Sync {
    /// Its first byte, among the device's addresses.
    fn address(&self) -> usize;

    /// The device.
    fn device(&self) -> &dyn Any;
}
