#![no_main]

use std::cell::RefCell;

use strata_fuzz::state::States;

thread_local! {
    static STATES: RefCell<States> = RefCell::new({
        let states = States::new();
        // The seed of the next run, where `run` made the folder for it.
        std::fs::write("target/seeds/state/seed-0", &states.own).ok();
        states
    });
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| STATES.with_borrow_mut(|states| states.check(bytes)));
