//! The thread that owns the engine: it takes jobs, runs steps, and tells clients what came of them.
//!
//! Nothing here waits for a client. Events go into bounded queues; a client whose queue is full or closed loses its
//! job, and with it its slot and pages, before the next step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use super::error::ApiError;
use super::job::{Cached, Command, End, Event, Job};
use super::metrics::{Metrics, lock};
use super::picture::{Picture, Rates, Shown};
use super::reading::Reading;
use super::scores::Scores;
use crate::document;
use crate::generation::Assembly;
use crate::ids::{SeqId, TokenId};
use crate::load::Model;
use crate::sampler::Sampled;
use crate::sequence::{Reason, Status};
use crate::session::{Engine, Output, Request};

/// How often the picture is drawn while steps run.
const DRAWN_EVERY: Duration = Duration::from_millis(50);

/// Says something to whoever started the server.
pub type Note = Arc<dyn Fn(&str) + Send + Sync>;

/// The owner of the engine.
pub struct Worker {
    engine: Engine,
    model: Arc<Model>,
    metrics: Arc<Metrics>,
    picture: Arc<Mutex<Picture>>,
    note: Note,
    commands: Receiver<Command>,
    jobs: BTreeMap<u64, Running>,
    /// Which choice of which job a sequence is.
    owners: BTreeMap<SeqId, (u64, usize)>,
    scores: BTreeMap<SeqId, Scores>,
    to_read: VecDeque<Arc<Reading>>,
    reading: Option<Current>,
    draining: bool,
    rates: Rates,
    drawn: Option<Instant>,
}

/// A job and what its choices have said.
struct Running {
    job: Job,
    choices: Vec<Speaking>,
}

/// A choice.
struct Speaking {
    /// None before its turn to be submitted, and after its end.
    id: Option<SeqId>,
    ended: bool,
    assembly: Assembly,
    last: Option<Instant>,
}

/// The document that is being read.
struct Current {
    reading: Arc<Reading>,
    id: SeqId,
    since: Instant,
}

impl Worker {
    /// With nothing to do yet.
    pub fn new(
        engine: Engine,
        model: Arc<Model>,
        metrics: Arc<Metrics>,
        picture: Arc<Mutex<Picture>>,
        commands: Receiver<Command>,
        note: Note,
    ) -> Self {
        Worker {
            engine,
            model,
            metrics,
            picture,
            note,
            commands,
            jobs: BTreeMap::new(),
            owners: BTreeMap::new(),
            scores: BTreeMap::new(),
            to_read: VecDeque::new(),
            reading: None,
            draining: false,
            rates: Rates::default(),
            drawn: None,
        }
    }

    /// Works until it is stopped, or nobody is left who could ask for anything.
    pub fn run(mut self) {
        self.draw();
        while self.take_commands() {
            self.begin_reading();
            if self.is_idle() {
                continue;
            }
            self.step();
            self.observe_reading();
            if self.drawn.is_none_or(|at| at.elapsed() >= DRAWN_EVERY) || self.is_idle() {
                self.draw();
            }
        }
        self.stop_reading();
    }

    fn is_idle(&self) -> bool {
        self.owners.is_empty() && self.reading.is_none()
    }

    /// Does what was asked for; waits if there is nothing else to do. False at the end.
    fn take_commands(&mut self) -> bool {
        loop {
            let idle = self.is_idle() && (self.to_read.is_empty() || self.draining);
            let command = if !idle {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                }
            } else {
                match self.commands.recv_timeout(Duration::from_secs(1)) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => {
                        self.draw(); // rates fall to nothing
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            };
            match command {
                Command::Run(job) => self.accept(job),
                Command::Cancel(id) => self.cancel(id),
                Command::Read(reading) => self.to_read.push_back(reading),
                Command::Forget(reading) => self.forget(&reading),
                Command::Drain => {
                    self.draining = true;
                    self.stop_reading();
                }
                Command::Stop => return false,
            }
        }
    }

    /// Takes a job on, or says why not.
    fn accept(&mut self, job: Job) {
        let mut choices = Vec::new();
        for choice in &job.choices {
            let tokenizer = self.model.tokenizer.as_ref();
            match Assembly::new(tokenizer, &choice.stops, &choice.eos) {
                Ok(assembly) => choices.push(Speaking {
                    id: None,
                    ended: false,
                    assembly: assembly.showing(&choice.shown),
                    last: None,
                }),
                Err(error) => {
                    let _ = job
                        .events
                        .try_send(Event::Failed(ApiError::invalid(error.to_string())));
                    return;
                }
            }
        }
        let id = job.id;
        if job.events.try_send(Event::Accepted).is_err() {
            return; // the client has left already
        }
        self.jobs.insert(id, Running { job, choices });
        self.submit(id, None);
    }

    /// Submits the choices that wait for `after`.
    fn submit(&mut self, job: u64, after: Option<usize>) {
        let Some(running) = self.jobs.get_mut(&job) else {
            return;
        };
        for i in 0..running.choices.len() {
            let (choice, speaking) = (&running.job.choices[i], &mut running.choices[i]);
            if choice.after != after || speaking.id.is_some() || speaking.ended {
                continue;
            }
            let submitted = self.engine.submit(Request {
                prompt: choice.prompt.to_vec(),
                max_tokens: choice.max_tokens,
                stop: choice.eos.clone(),
                sampling: choice.sampling.clone(),
                prompt_logits: choice.score_prompt.is_some(),
                marks: Vec::new(),
            });
            match submitted {
                Ok(id) => {
                    speaking.id = Some(id);
                    self.owners.insert(id, (job, i));
                    if let Some(top) = choice.score_prompt {
                        self.scores
                            .insert(id, Scores::new(choice.prompt.clone(), top));
                    }
                }
                Err(error) => {
                    self.fail(job, ApiError::refused(&error));
                    return;
                }
            }
        }
    }

    /// Runs a step and tells what came of it.
    fn step(&mut self) {
        let stepped = if self.scores.is_empty() {
            self.engine.advance()
        } else {
            let scores = &mut self.scores;
            self.engine.step(&mut |id, position, logits| {
                if let Some(scores) = scores.get_mut(&id) {
                    scores.row(position, logits);
                }
            })
        };
        self.metrics.steps.fetch_add(1, Relaxed);
        match stepped {
            Ok(true) => self.tell(),
            // Everybody who is waited for has ended; that cannot be, and must not spin.
            Ok(false) => self.fail_all(&ApiError::internal("the engine has nothing to do")),
            Err(error) => {
                self.metrics.failed_steps.fetch_add(1, Relaxed);
                let error = ApiError::failed(error, &self.model);
                (self.note)(&format!("a step failed: {}", error.message));
                self.fail_ended(&error);
            }
        }
    }

    fn tell(&mut self) {
        let outputs = self.engine.outputs().to_vec();
        let tokens = outputs.iter().filter(|o| matches!(o, Output::Token { .. }));
        let tokens = tokens.count();
        self.rates.add(self.engine.prompt_rows(), tokens);
        self.metrics
            .generated_tokens
            .fetch_add(tokens as u64, Relaxed);
        for output in outputs {
            match output {
                Output::Token { id, sampled } => self.token(id, sampled),
                Output::Finished { id, reason } => self.end(id, reason),
            }
        }
    }

    /// A sequence has a token.
    fn token(&mut self, id: SeqId, sampled: Sampled) {
        let Some(&(number, choice)) = self.owners.get(&id) else {
            return;
        };
        let Some(running) = self.jobs.get_mut(&number) else {
            return;
        };
        let speaking = &mut running.choices[choice];
        let now = Instant::now();
        let is_first = speaking.last.is_none();
        match speaking.last.replace(now) {
            None if choice == 0 => self.metrics.first_token.add(now - running.job.received),
            None => {}
            Some(last) => self.metrics.between_tokens.add(now - last),
        }
        let text = match speaking.assembly.push(&sampled) {
            Ok(text) => text,
            Err(error) => {
                self.fail(number, ApiError::internal(error.to_string()));
                return;
            }
        };
        let stopped = speaking.assembly.stopped();
        let event = Event::Token {
            choice,
            sampled,
            text,
        };
        if running.job.events.try_send(event).is_err() {
            self.cancel(number);
            return;
        }
        if is_first {
            self.submit(number, Some(choice));
        }
        if stopped {
            self.engine.finish(id, Reason::Stop);
            self.end(id, Reason::Stop);
        }
    }

    /// A sequence is at its end.
    fn end(&mut self, id: SeqId, reason: Reason) {
        if let (Some(failure), Some((number, _))) = (self.engine.failure(id), self.owners.get(&id))
        {
            // Its form or its penalties, which the client asked for, leave no token.
            let (error, number) = (ApiError::invalid(failure.to_string()), *number);
            self.fail(number, error);
            return;
        }
        let Some((number, choice)) = self.owners.remove(&id) else {
            return;
        };
        let reuse = self.engine.reuse(id).cloned();
        self.engine.remove(id);
        let scores = self.scores.remove(&id);
        let Some(running) = self.jobs.get_mut(&number) else {
            return;
        };
        let asked = &running.job.choices[choice];
        let tokenizer = self.model.tokenizer.clone();
        let text = move |token: TokenId| {
            let text = tokenizer
                .as_ref()
                .and_then(|t| t.decode(&[token], false).ok());
            text.unwrap_or_else(|| token.to_string())
        };
        let cached = Cached::new(asked.prompt.len(), reuse.as_ref(), &text);
        let generated = running.choices[choice].assembly.tokens.len();
        // The last one is not read.
        let read = asked.prompt.len() + generated.saturating_sub(1);
        let cached = cached.seeing(&self.model.network.graph, read);
        if asked.after.is_none() {
            let tokens = asked.prompt.len() as u64;
            self.metrics.prompt_tokens.fetch_add(tokens, Relaxed);
            self.metrics.cached(&cached);
            let at = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |t| t.as_secs());
            lock(&self.picture).decided(&running.job.name, at, cached.clone());
        }
        let speaking = &mut running.choices[choice];
        (speaking.id, speaking.ended) = (None, true);
        let event = match speaking.assembly.end(reason) {
            Ok((reason, rest)) => Event::End {
                choice,
                end: End {
                    reason,
                    rest,
                    generated,
                    cached,
                    prompt_scores: scores.map_or(Vec::new(), Scores::finish),
                },
            },
            Err(error) => {
                self.fail(number, ApiError::internal(error.to_string()));
                return;
            }
        };
        if running.job.events.try_send(event).is_err() {
            self.cancel(number);
            return;
        }
        // Those that waited for its first token, where none was asked for.
        self.submit(number, Some(choice));
        let ended = |running: &Running| running.choices.iter().all(|c| c.ended);
        if self.jobs.get(&number).is_some_and(ended) {
            self.jobs.remove(&number);
        }
    }

    /// Forgets a job; whoever waits for it sees its events end.
    fn cancel(&mut self, number: u64) {
        if self.drop_job(number).is_some() {
            self.metrics.cancelled.fetch_add(1, Relaxed);
        }
    }

    fn fail(&mut self, number: u64, error: ApiError) {
        if let Some(running) = self.drop_job(number) {
            // If its queue is full or closed, nobody reads it.
            let _ = running.job.events.try_send(Event::Failed(error));
        }
    }

    fn drop_job(&mut self, number: u64) -> Option<Running> {
        let running = self.jobs.remove(&number)?;
        for id in running.choices.iter().filter_map(|c| c.id) {
            self.owners.remove(&id);
            self.scores.remove(&id);
            self.engine.remove(id);
        }
        Some(running)
    }

    fn fail_all(&mut self, error: &ApiError) {
        let numbers: Vec<u64> = self.jobs.keys().copied().collect();
        numbers
            .into_iter()
            .for_each(|number| self.fail(number, error.clone()));
        if let Some(current) = self.reading.take() {
            self.engine.remove(current.id);
            current.reading.failed(error.message.clone());
        }
    }

    /// A step has failed: so have the sequences that were in it.
    fn fail_ended(&mut self, error: &ApiError) {
        let engine = &self.engine;
        let has_failed = |id: &SeqId| {
            let status = engine.sequence(*id).map(|s| s.status);
            status.is_none_or(|s| matches!(s, Status::Finished(_)))
        };
        let failed: Vec<u64> = self
            .owners
            .iter()
            .filter(|(id, _)| has_failed(id))
            .map(|(_, (number, _))| *number)
            .collect();
        let reading_failed = self.reading.as_ref().is_some_and(|c| has_failed(&c.id));
        if failed.is_empty() && !reading_failed {
            // Nobody can go on, and nobody is to blame.
            self.fail_all(error);
            return;
        }
        failed
            .into_iter()
            .for_each(|number| self.fail(number, error.clone()));
        if reading_failed && let Some(current) = self.reading.take() {
            self.engine.remove(current.id);
            current.reading.failed(error.message.clone());
        }
    }

    fn draw(&mut self) {
        let mut shown = Vec::new();
        for (number, choice) in self.owners.values() {
            let Some(running) = self.jobs.get(number) else {
                continue;
            };
            let id = running.choices[*choice].id;
            shown.extend(id.and_then(|id| show(&self.engine, id, running.job.name.clone())));
        }
        if let Some(current) = &self.reading {
            let name = format!("reading {}", current.reading.name);
            shown.extend(show(&self.engine, current.id, name));
        }
        let waiting = self.engine.waiting();
        let rates = self.rates.now();
        lock(&self.picture).draw(&self.engine, shown, waiting, rates);
        self.drawn = Some(Instant::now());
    }
}

/// Documents: one at a time, so that they never take the places of those who wait for an answer.
impl Worker {
    /// Begins with the next document, if none is being read.
    fn begin_reading(&mut self) {
        while self.reading.is_none() && !self.draining {
            let Some(reading) = self.to_read.pop_front() else {
                return;
            };
            if let Some(file) = &reading.known
                && let Err(error) = self.engine.attach(file)
            {
                (self.note)(&format!("{error}; it is read anew"));
            }
            let tokens = reading.placed.tokens.len();
            if reading.known.as_ref().is_some_and(|file| {
                let prefix = self.model.network.graph.prefix;
                file.len() == tokens + prefix
            }) {
                reading.progress(tokens, tokens, 0.0);
                reading.ready(None);
                continue;
            }
            let submitted = self.engine.submit(Request {
                prompt: reading.placed.tokens.clone(),
                marks: reading.placed.ends.clone(),
                ..Request::default()
            });
            match submitted {
                Ok(id) => {
                    reading.progress(0, 0, 0.0);
                    let since = Instant::now();
                    self.reading = Some(Current { reading, id, since });
                }
                Err(error) => reading.failed(error.to_string()),
            }
        }
    }

    /// Takes note of how far the document is, and keeps it at its end.
    fn observe_reading(&mut self) {
        let Some(current) = &self.reading else { return };
        let read = self.engine.computed(current.id);
        let resumed = self.engine.reuse(current.id).map_or(0, |r| r.resumed);
        let seconds = current.since.elapsed().as_secs_f64();
        if read > 0 {
            current.reading.progress(resumed, read, seconds);
        }
        if read == current.reading.placed.tokens.len()
            && let Some(current) = self.reading.take()
        {
            let kept = self.keep(&current, read);
            if let Err(error) = &kept {
                (self.note)(&format!(
                    "{}: it was read, but is not kept: {error}",
                    current.reading.name
                ));
            }
            current.reading.ready(kept.err());
            self.engine.remove(current.id);
        }
    }

    /// Keeps what was read of a document, in memory and as a file.
    fn keep(&mut self, current: &Current, read: usize) -> Result<(), String> {
        self.engine.keep_state(current.id, true);
        let reading = &current.reading;
        let Some(path) = &reading.path else {
            return Ok(());
        };
        self.engine.detach(path);
        document::write(&self.engine, &reading.placed, read, &reading.notes, path)
            .map_err(|e| e.to_string())?;
        let book = document::Book::open(path).map_err(|e| e.to_string())?;
        self.engine.attach(&book.file).map_err(|e| e.to_string())
    }

    /// Reads the document at hand no further; what was read of it is kept, and goes on after a restart.
    fn stop_reading(&mut self) {
        if let Some(current) = self.reading.take() {
            let read = self.engine.computed(current.id);
            if read > 0
                && current.reading.path.is_some()
                && let Err(error) = self.keep(&current, read)
            {
                (self.note)(&format!("{}: {error}", current.reading.name));
            }
            self.engine.remove(current.id);
        }
    }

    fn forget(&mut self, reading: &Arc<Reading>) {
        self.to_read.retain(|other| other.id != reading.id);
        if let Some(current) = self.reading.take_if(|c| c.reading.id == reading.id) {
            self.engine.remove(current.id);
        }
        if let Some(path) = &reading.path {
            self.engine.detach(path);
            // The file of a document that was being written when it was deleted.
            let _ = std::fs::remove_file(path);
        }
        self.engine.forget_prompt(&reading.placed.tokens);
    }
}

fn show(engine: &Engine, id: SeqId, request: String) -> Option<Shown> {
    let sequence = engine.sequence(id)?;
    let prefix = engine.network().graph.prefix;
    Some(Shown {
        request,
        prompt_tokens: sequence.prompt_len.saturating_sub(prefix),
        computed_tokens: engine.computed(id),
        generated_tokens: sequence.generated().len(),
        doing: match sequence.status {
            Status::Running if sequence.is_decoding() => "writing",
            Status::Running => "reading",
            Status::Waiting | Status::Preempted | Status::Finished(_) => "waiting",
        },
    })
}
