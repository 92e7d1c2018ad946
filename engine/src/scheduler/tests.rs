use super::*;
use crate::sequence::Limits;

const CONFIG: SchedulerConfig = SchedulerConfig {
    reach: None,
    page_size: 4,
    pages: Some(100),
    slots: Some(10),
    token_budget: 16,
    max_sequences: 8,
    chunk: Chunk::AtMost(16),
    context: 1000,
};

fn scheduler(config: SchedulerConfig) -> Scheduler {
    Scheduler::new(config).unwrap()
}

fn request(prompt: usize, max_tokens: usize) -> SequenceRequest {
    SequenceRequest {
        prompt: (0..prompt as TokenId).collect(),
        limits: Limits {
            max_tokens,
            stop: Vec::new(),
        },
        ..Default::default()
    }
}

/// The rows of a step: sequence, position, length.
type Rows = Vec<(u64, usize, usize)>;

/// Runs a step that samples `token` wherever one is wanted.
fn step(scheduler: &mut Scheduler, batch: &mut Batch, token: TokenId) -> (Rows, Vec<Event>) {
    let mut events = Vec::new();
    if scheduler.next(batch) == Step::Run {
        let sampled: Vec<_> = batch
            .spans
            .iter()
            .filter(|s| s.sample)
            .map(|s| (s.seq, token))
            .collect();
        scheduler.done(batch, &sampled, &mut events);
    }
    (
        batch
            .spans
            .iter()
            .map(|s| (s.seq.0, s.position, s.len))
            .collect(),
        events,
    )
}

fn rows(scheduler: &mut Scheduler) -> Rows {
    step(scheduler, &mut Batch::new(), 7).0
}

#[test]
fn all_faults_of_a_configuration_are_named() {
    let check = |config: SchedulerConfig, expected: &str| {
        assert_eq!(Scheduler::new(config).unwrap_err().to_string(), expected);
    };
    check(
        SchedulerConfig {
            page_size: 0,
            pages: Some(0),
            context: 0,
            ..CONFIG
        },
        "page_size is 0, expected at least 1\npages is 0, expected at least 1\ncontext is 0, expected at least 1",
    );
    check(
        SchedulerConfig {
            chunk: Chunk::Every(17),
            ..CONFIG
        },
        "token_budget is 16, expected a chunk of 17 to fit",
    );
}

#[test]
fn no_more_run_than_leave_a_prompt_its_rows() {
    for (chunk, max_sequences, limit) in [
        (Chunk::AtMost(4), 8, 8),
        (Chunk::AtMost(4), 30, 16),
        (Chunk::Every(4), 30, 13),
        (Chunk::Every(16), 30, 1),
    ] {
        let config = SchedulerConfig {
            chunk,
            max_sequences,
            ..CONFIG
        };
        assert_eq!(scheduler(config).running_limit(), limit, "{chunk:?}");
    }
}

#[test]
fn what_cannot_run_is_refused_with_its_numbers() {
    let small = SchedulerConfig {
        pages: Some(3),
        context: 50,
        ..CONFIG
    };
    for (prompt, max_tokens, message) in [
        (0, 5, "the prompt is empty"),
        (
            41,
            10,
            "41 prompt tokens and 10 to generate do not fit a context of 50",
        ),
        (
            1,
            usize::MAX,
            "1 prompt tokens and 18446744073709551615 to generate do not fit a context of 50",
        ),
        (
            4,
            10,
            "4 prompt tokens and 10 to generate need 4 pages, there are 3",
        ),
    ] {
        let refused = scheduler(small.clone())
            .submit(request(prompt, max_tokens))
            .unwrap_err();
        assert_eq!(refused.to_string(), message);
    }
    // The last token sampled needs no page.
    assert!(scheduler(small).submit(request(4, 9)).is_ok());
}

#[test]
fn a_limit_nobody_means_to_reach_costs_nothing() {
    let config = SchedulerConfig {
        pages: None,
        context: usize::MAX,
        ..CONFIG
    };
    let mut scheduler = scheduler(config);
    let id = scheduler.submit(request(2, usize::MAX)).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 0, 2)]);
    assert_eq!(rows(&mut scheduler), [(0, 2, 1)]);
    assert!(scheduler.sequence(id).unwrap().tokens.capacity() < 100_000);
}

#[test]
fn decode_rows_come_first_and_a_short_prompt_passes_a_long_one() {
    let mut scheduler = scheduler(CONFIG);
    scheduler.submit(request(1, 9)).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 0, 1)]);
    scheduler.submit(request(100, 9)).unwrap();
    scheduler.submit(request(4, 9)).unwrap();
    // Fewest tokens first in this step, the oldest prompt first in the next.
    assert_eq!(rows(&mut scheduler), [(0, 1, 1), (1, 0, 11), (2, 0, 4)]);
    scheduler.submit(request(4, 9)).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 2, 1), (2, 4, 1), (1, 11, 14)]);
    assert_eq!(
        rows(&mut scheduler),
        [(0, 3, 1), (2, 5, 1), (1, 25, 10), (3, 0, 4)]
    );
}

#[test]
fn short_prompts_without_end_do_not_starve_a_long_one() {
    for chunk in [Chunk::AtMost(8), Chunk::Every(8)] {
        let mut scheduler = scheduler(SchedulerConfig {
            chunk,
            token_budget: 15,
            ..CONFIG
        });
        let mut batch = Batch::new();
        let long = scheduler.submit(request(160, 1)).unwrap();
        let mut steps = 0;
        while !scheduler.sequence(long).unwrap().is_finished() {
            scheduler.submit(request(8, 1)).unwrap();
            scheduler.submit(request(8, 1)).unwrap();
            step(&mut scheduler, &mut batch, 7);
            steps += 1;
        }
        assert!(steps <= 2 * 160 / 8, "{chunk:?}: {steps} steps");
    }
}

#[test]
fn fixed_chunks_end_at_multiples_whoever_else_runs() {
    let mut scheduler = scheduler(SchedulerConfig {
        chunk: Chunk::Every(6),
        ..CONFIG
    });
    scheduler.submit(request(15, 9)).unwrap();
    scheduler.submit(request(13, 9)).unwrap();
    scheduler.submit(request(2, 9)).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 0, 6), (1, 0, 6), (2, 0, 2)]);
    assert_eq!(rows(&mut scheduler), [(2, 2, 1), (0, 6, 6), (1, 6, 6)]);
    assert_eq!(rows(&mut scheduler), [(2, 3, 1), (0, 12, 3), (1, 12, 1)]);
}

#[test]
fn a_chunk_ends_where_a_snapshot_is_wanted() {
    let mut scheduler = scheduler(CONFIG);
    scheduler
        .submit(SequenceRequest {
            cuts: vec![8],
            ..request(11, 9)
        })
        .unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 0, 8)]);
    assert_eq!(rows(&mut scheduler), [(0, 8, 3)]);
}

#[test]
fn the_latest_is_preempted_and_computes_prompt_and_generated_again() {
    let mut scheduler = scheduler(SchedulerConfig {
        pages: Some(5),
        ..CONFIG
    });
    scheduler.submit(request(7, 8)).unwrap();
    let second = scheduler.submit(request(6, 6)).unwrap();
    let third = scheduler.submit(request(1, 1)).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 0, 7), (1, 0, 6)]);
    assert_eq!(rows(&mut scheduler), [(0, 7, 1), (1, 6, 1)]);
    // The first takes the fifth page; the second still has room in its own, then sits out.
    assert_eq!(rows(&mut scheduler), [(0, 8, 1), (1, 7, 1)]);
    for position in 9..12 {
        assert_eq!(rows(&mut scheduler), [(0, position, 1)]);
    }
    // The first needs one more.
    assert_eq!(rows(&mut scheduler), [(0, 12, 1)]);
    assert_eq!(
        scheduler.sequence(second).unwrap().status,
        Status::Preempted
    );
    assert!(
        scheduler.waiting().eq([second, third]),
        "it stands where it stood"
    );
    assert_eq!(rows(&mut scheduler), [(0, 13, 1)]);
    assert_eq!(rows(&mut scheduler), [(1, 0, 9), (2, 0, 1)]);
    assert_eq!(scheduler.preemptions(), 1);
}

#[test]
fn state_of_finished_sequences_gives_way_first() {
    let mut scheduler = scheduler(SchedulerConfig {
        pages: Some(2),
        slots: Some(1),
        ..CONFIG
    });
    let first = scheduler.submit(request(8, 1)).unwrap();
    scheduler.submit(request(8, 1)).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 0, 8)]);
    assert!(scheduler.sequence(first).unwrap().holds_state());
    assert_eq!(rows(&mut scheduler), [(1, 0, 8)]);
    assert!(!scheduler.sequence(first).unwrap().holds_state());
    assert_eq!(scheduler.preemptions(), 0);
}

#[test]
fn a_fork_copies_the_page_it_would_write_and_no_other() {
    let mut scheduler = scheduler(CONFIG);
    let mut batch = Batch::new();
    let parent = scheduler.submit(request(6, 9)).unwrap();
    step(&mut scheduler, &mut batch, 7);
    let fork = scheduler.fork(parent).unwrap();
    assert_eq!(fork.copy, Some((SlotId(0), SlotId(1))));
    step(&mut scheduler, &mut batch, 7);
    assert_eq!(
        batch.copies,
        [(PageId(1), PageId(2))],
        "the parent writes first; the page is then the fork's"
    );
    let pages = |id| scheduler.sequence(id).unwrap().pages.clone();
    assert_eq!(
        (pages(parent), pages(fork.id)),
        (vec![PageId(0), PageId(2)], vec![PageId(0), PageId(1)])
    );
    assert_eq!(
        scheduler.fork(SeqId(9)).unwrap_err().to_string(),
        "there is no sequence 9"
    );
}

#[test]
fn a_fork_without_a_slot_computes_its_tokens_again() {
    let mut scheduler = scheduler(SchedulerConfig {
        slots: Some(1),
        ..CONFIG
    });
    let parent = scheduler.submit(request(6, 2)).unwrap();
    let behind = scheduler.submit(request(1, 1)).unwrap();
    rows(&mut scheduler);
    let fork = scheduler.fork(parent).unwrap();
    assert_eq!(fork.copy, None);
    assert!(
        scheduler.waiting().eq([fork.id, behind]),
        "a fork stands before later arrivals"
    );
    rows(&mut scheduler);
    assert_eq!(rows(&mut scheduler), [(2, 0, 7)]);
}

#[test]
fn a_sequence_ends_by_its_limits() {
    let length = |id| Event::Finished {
        id,
        reason: Reason::Length,
    };
    let stop = |id| Event::Finished {
        id,
        reason: Reason::Stop,
    };
    let token = |id| Event::Token { id, token: 7 };
    let id = SeqId(0);
    for (max_tokens, stop_tokens, expected) in [
        (0, vec![], vec![length(id)]),
        (2, vec![], vec![token(id), token(id), length(id)]),
        (2, vec![7], vec![token(id), stop(id)]),
        (1, vec![3, 7], vec![token(id), stop(id)]),
    ] {
        let mut scheduler = scheduler(CONFIG);
        let limits = Limits {
            max_tokens,
            stop: stop_tokens,
        };
        scheduler
            .submit(SequenceRequest {
                limits,
                ..request(3, 0)
            })
            .unwrap();
        let mut found = Vec::new();
        loop {
            let (rows, events) = step(&mut scheduler, &mut Batch::new(), 7);
            found.extend(events);
            if rows.is_empty() {
                break;
            }
        }
        assert_eq!(found, expected);
    }
}

#[test]
fn logits_are_asked_for_where_they_are_used() {
    let check = |request: SequenceRequest, expected: &[(Logits, bool)]| {
        let mut scheduler = scheduler(SchedulerConfig {
            token_budget: 4,
            ..CONFIG
        });
        scheduler.submit(request).unwrap();
        let mut batch = Batch::new();
        for &expected in expected {
            step(&mut scheduler, &mut batch, 7);
            assert_eq!((batch.spans[0].logits, batch.spans[0].sample), expected);
        }
    };
    let all = |request| SequenceRequest {
        prompt_logits: true,
        ..request
    };
    check(
        request(6, 2),
        &[
            (Logits::None, false),
            (Logits::Last, true),
            (Logits::Last, true),
        ],
    );
    check(
        request(6, 0),
        &[(Logits::None, false), (Logits::None, false)],
    );
    check(
        all(request(6, 2)),
        &[
            (Logits::All, false),
            (Logits::All, true),
            (Logits::Last, true),
        ],
    );
    check(
        all(request(6, 0)),
        &[(Logits::All, false), (Logits::All, false)],
    );
}

#[test]
fn a_wrong_state_is_refused_and_stays_the_callers() {
    let mut scheduler = scheduler(CONFIG);
    let page = scheduler.pages_mut().unwrap().alloc().unwrap();
    let slot = scheduler.slots_mut().unwrap().alloc();
    for (computed, pages, slot, message) in [
        (
            6,
            &[page][..],
            slot,
            "the state is of 6 tokens of 6, at least one must be left to compute",
        ),
        (
            5,
            &[page],
            slot,
            "the state of 5 tokens fills 2 pages, found 1",
        ),
        (
            4,
            &[page],
            None,
            "the state of 4 tokens has 1 slots, found 0",
        ),
        (0, &[], slot, "the state of 0 tokens has 0 slots, found 1"),
    ] {
        let refused = scheduler
            .adopt(request(6, 1), computed, pages, slot)
            .unwrap_err();
        assert_eq!(refused.to_string(), message);
    }
    let id = scheduler.adopt(request(6, 1), 4, &[page], slot).unwrap();
    assert_eq!(rows(&mut scheduler), [(0, 4, 2)]);
    let taken = scheduler.take(id).unwrap();
    assert_eq!(
        (taken.computed, taken.pages.len(), taken.slot),
        (6, 2, slot)
    );
    assert_eq!(
        (scheduler.take(id).is_none(), scheduler.remove(id)),
        (true, false)
    );
}

#[test]
fn pages_held_outside_are_asked_for() {
    let mut scheduler = scheduler(SchedulerConfig {
        pages: Some(3),
        ..CONFIG
    });
    let held = scheduler.pages_mut().unwrap().alloc().unwrap();
    scheduler.submit(request(12, 1)).unwrap();
    let wanted = Wanted { pages: 3, slots: 1 };
    assert_eq!(
        (scheduler.wanted(), scheduler.next(&mut Batch::new())),
        (wanted, Step::Short(wanted))
    );
    scheduler.pages_mut().unwrap().release(held);
    assert_eq!(rows(&mut scheduler), [(0, 0, 12)]);
}

#[test]
fn what_is_cancelled_during_a_step_is_left_alone() {
    let mut scheduler = scheduler(CONFIG);
    let (mut batch, mut events) = (Batch::new(), Vec::new());
    let ids = [(); 3].map(|()| scheduler.submit(request(2, 5)).unwrap());
    assert_eq!(scheduler.next(&mut batch), Step::Run);
    assert!(scheduler.cancel(ids[0]) && scheduler.remove(ids[1]) && !scheduler.cancel(ids[0]));
    scheduler.done(&batch, &[(ids[0], 7), (ids[2], 7)], &mut events);
    assert_eq!(
        events,
        [Event::Token {
            id: ids[2],
            token: 7
        }]
    );
    assert_eq!(
        (
            scheduler.pages().unwrap().used(),
            scheduler.slots().unwrap().used()
        ),
        (1, 1)
    );
}

#[test]
fn steps_reuse_their_memory() {
    let mut scheduler = scheduler(CONFIG);
    let mut batch = Batch::new();
    let ids = [(); 8].map(|()| scheduler.submit(request(2, 90)).unwrap());
    step(&mut scheduler, &mut batch, 7);
    let memory = |scheduler: &Scheduler, batch: &Batch| {
        let sequences = ids.map(|id| scheduler.sequence(id).unwrap());
        let sequences = sequences.map(|s| (s.tokens.as_ptr(), s.pages.as_ptr()));
        (
            sequences,
            scheduler.rows.as_ptr(),
            batch.tokens.as_ptr(),
            batch.spans.as_ptr(),
        )
    };
    let before = memory(&scheduler, &batch);
    for _ in 0..80 {
        step(&mut scheduler, &mut batch, 7);
    }
    assert_eq!(memory(&scheduler, &batch), before);
}
