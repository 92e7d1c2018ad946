//! Activations, gated or not.

use super::Cpu;
use super::elementwise::Activated;
use crate::ops::Activate;

impl Cpu {
    pub(super) fn do_activate(&self, op: Activate<'_>) {
        let map = Activated {
            act: op.act,
            gated: op.gate.is_some(),
        };
        let (x, y) = (op.x.view(), op.y.view_mut());
        match op.gate {
            Some(gate) => self.map(map, gate.view(), Some(x), y, 4),
            None => self.map(map, x, None, y, 4),
        }
    }
}
