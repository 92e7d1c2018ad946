//! Server-sent events: a body that tells a job's events as they come, and cancels the job when it is dropped.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Frame;
use serde_json::Value;
use tokio::time::{Interval, Sleep};

use super::error::ApiError;
use super::job::{End, Event, Ticket};
use crate::sampler::Sampled;

/// How often a stream that has nothing to tell says that it is alive.
const ALIVE_EVERY: Duration = Duration::from_secs(10);

/// Events, as text.
#[derive(Debug, Default)]
pub struct Sse(String);

impl Sse {
    /// An event without a name.
    pub fn data(&mut self, value: &Value) {
        // JSON's text has no line breaks.
        self.0.push_str("data: ");
        self.0.push_str(&value.to_string());
        self.0.push_str("\n\n");
    }

    /// An event with a name.
    pub fn event(&mut self, name: &str, value: &Value) {
        self.0.push_str("event: ");
        self.0.push_str(name);
        self.0.push('\n');
        self.data(value);
    }

    /// The end of OpenAI's streams.
    pub fn done(&mut self) {
        self.0.push_str("data: [DONE]\n\n");
    }
}

/// How an interface tells what happens.
pub trait Telling: Send + 'static {
    /// Before anything has happened.
    fn begin(&mut self, out: &mut Sse);
    /// A choice has a token, and a text that it settled.
    fn token(&mut self, choice: usize, sampled: Sampled, text: &str, out: &mut Sse);
    /// A choice is at its end.
    fn end(&mut self, choice: usize, end: End, out: &mut Sse);
    /// All choices are.
    fn finish(&mut self, out: &mut Sse);
    /// The job failed.
    fn fail(&mut self, error: &ApiError, out: &mut Sse) {
        out.data(&error.body());
    }
}

/// A body of events.
struct Stream<T> {
    ticket: Ticket,
    telling: T,
    /// Choices that have not ended.
    open: usize,
    begun: bool,
    over: bool,
    deadline: Pin<Box<Sleep>>,
    alive: Interval,
}

/// The answer that tells a job of `choices` choices as it goes on.
pub fn answer(ticket: Ticket, choices: usize, telling: impl Telling + Unpin) -> Response<Body> {
    let mut alive = tokio::time::interval(ALIVE_EVERY);
    alive.reset();
    let stream = Stream {
        deadline: Box::pin(tokio::time::sleep_until(ticket.deadline())),
        ticket,
        telling,
        open: choices,
        begun: false,
        over: false,
        alive,
    };
    let mut response = Response::new(Body::new(UnsyncBoxBody::new(stream)));
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that gather answers would hold tokens back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl<T: Telling + Unpin> Stream<T> {
    fn tell(&mut self, event: Result<Event, ApiError>, out: &mut Sse) {
        match event {
            Ok(Event::Token {
                choice,
                sampled,
                text,
            }) => self.telling.token(choice, sampled, &text, out),
            Ok(Event::End { choice, end }) => {
                self.telling.end(choice, end, out);
                self.open -= 1;
                if self.open == 0 {
                    self.telling.finish(out);
                    self.over = true;
                }
            }
            Ok(Event::Accepted) => {}
            Ok(Event::Failed(error)) | Err(error) => {
                self.telling.fail(&error, out);
                self.over = true;
            }
        }
    }
}

impl<T: Telling + Unpin> hyper::body::Body for Stream<T> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let mut out = Sse::default();
        if !this.begun {
            this.begun = true;
            this.telling.begin(&mut out);
        }
        // All that is there goes into one frame.
        while !this.over {
            match this.ticket.poll(context) {
                Poll::Ready(event) => this.tell(event, &mut out),
                Poll::Pending => break,
            }
        }
        if !this.over && this.deadline.as_mut().poll(context).is_ready() {
            let late = this.ticket.late();
            this.tell(Err(late), &mut out);
        }
        if !out.0.is_empty() {
            this.alive.reset();
            return Poll::Ready(Some(Ok(Frame::data(out.0.into()))));
        }
        if this.over {
            return Poll::Ready(None);
        }
        match this.alive.poll_tick(context) {
            Poll::Ready(_) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(
                b": still at work\n\n",
            ))))),
            Poll::Pending => Poll::Pending,
        }
    }
}
