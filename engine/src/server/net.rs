//! Connections: taking them, holding slow clients to a time, closing them at the end.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, Sleep};

/// Most connections at once.
const MOST_CONNECTIONS: usize = 1024;
/// How long connections may take to end at the end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How long clients may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// To send the head of a request.
    pub read: Duration,
    /// To take what they are sent, while nothing moves.
    pub write: Duration,
}

/// Serves connections until `stop` says so, and then until they have ended, or a short time is over.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    patience: Patience,
    mut stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Too many open files, for instance: others may end meanwhile.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue; // closed by being dropped
        };
        let (router, stop) = (router.clone(), stop.clone());
        tokio::spawn(async move {
            connection(stream, router, patience, stop).await;
            drop(place);
        });
    }
    drop(listener);
    let all = places.acquire_many(MOST_CONNECTIONS as u32);
    // Whoever has not taken his last words by then is left alone.
    let _ = tokio::time::timeout(LAST_WORDS, all).await;
}

async fn connection(
    stream: TcpStream,
    router: Router,
    patience: Patience,
    mut stop: watch::Receiver<bool>,
) {
    // Tokens are small, and wanted at once. A socket that cannot do so is slower, not wrong.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Timed::new(stream, patience.write));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.read)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    // An error is that of a client who left or sent what is no HTTP, who has been told.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stop.wait_for(|stop| *stop) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// A connection whose other end must take what it is sent: if nothing moves for so long, it is at its end.
struct Timed {
    stream: TcpStream,
    patience: Duration,
    sleep: Pin<Box<Sleep>>,
    waiting: bool,
}

impl Timed {
    fn new(stream: TcpStream, patience: Duration) -> Self {
        Timed {
            stream,
            patience,
            sleep: Box::pin(tokio::time::sleep(patience)),
            waiting: false,
        }
    }

    /// What came of trying to write, or an error if that has been tried for too long.
    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        tried: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if tried.is_ready() {
            self.waiting = false;
            return tried;
        }
        if !self.waiting {
            self.waiting = true;
            self.sleep.as_mut().reset(Instant::now() + self.patience);
        }
        match self.sleep.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Timed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let tried = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, tried)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let tried = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.judge(context, tried)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let tried = Pin::new(&mut self.stream).poll_flush(context);
        self.judge(context, tried)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let tried = Pin::new(&mut self.stream).poll_shutdown(context);
        self.judge(context, tried)
    }
}
