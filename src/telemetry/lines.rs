//! Log lines on their way to where they are read: gathered, and written together a few milliseconds later.
//!
//! Promises: lines stay whole and in their order. A warning or an error is written, with everything before it, before
//! whoever logs it goes on; anything else within [`GATHERED_FOR`], by a thread of its own, and at the end of the process
//! ([`Lines::write_out`]). Memory is bounded: whoever logs beyond [`MOST_BYTES`] writes by himself, and waits for that. A process that is
//! killed may lose the lines of its last milliseconds, which nobody had been promised; what it did is in the database.
//!
//! A `write` for each line was a thirtieth of all that a notification cost.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// How long a line may wait for others.
const GATHERED_FOR: Duration = Duration::from_millis(5);

/// With so much gathered, whoever logs writes it.
const MOST_BYTES: usize = 64 * 1024;

/// Lines, and where they go.
pub(super) struct Lines<W> {
    gathered: Mutex<Vec<u8>>,
    /// There are some where there were none.
    some: Condvar,
    /// Locked before `gathered`, so that what was gathered first is written first.
    out: Mutex<Out<W>>,
}

struct Out<W> {
    to: W,
    /// The room of the lines before, to be used again.
    room: Vec<u8>,
}

/// Whoever panicked with a lock left whole lines behind: each is added at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<W: Write + Send + 'static> Lines<W> {
    /// Starts the thread that writes.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn start(to: W) -> io::Result<Arc<Self>> {
        let out = Mutex::new(Out { to, room: Vec::new() });
        let lines = Arc::new(Self { gathered: Mutex::default(), some: Condvar::new(), out });
        let writing = Arc::clone(&lines);
        std::thread::Builder::new().name("log".to_owned()).spawn(move || writing.write_on())?;
        Ok(lines)
    }

    fn write_on(&self) -> ! {
        loop {
            drop(self.some.wait_while(lock(&self.gathered), |gathered| gathered.is_empty()));
            std::thread::sleep(GATHERED_FOR);
            self.write_out();
        }
    }

    /// Writes what was gathered.
    pub(super) fn write_out(&self) {
        let mut out = lock(&self.out);
        let Out { to, room } = &mut *out;
        std::mem::swap(room, &mut *lock(&self.gathered));
        // Where nobody can read it, nobody can be told.
        _ = to.write_all(room);
        _ = to.flush();
        room.clear();
        room.shrink_to(2 * MOST_BYTES);
    }

    fn add(&self, line: &[u8]) {
        let (first, full) = {
            let mut gathered = lock(&self.gathered);
            let first = gathered.is_empty();
            gathered.extend_from_slice(line);
            (first, gathered.len() >= MOST_BYTES)
        };
        if full {
            self.write_out();
        } else if first {
            self.some.notify_one();
        }
    }
}

/// Where one event writes its line.
pub(super) struct Line<'a, W: Write + Send + 'static> {
    lines: &'a Lines<W>,
    at_once: bool,
}

impl<W: Write + Send + 'static> Write for Line<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lines.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write + Send + 'static> Drop for Line<'_, W> {
    fn drop(&mut self) {
        if self.at_once {
            self.lines.write_out();
        }
    }
}

/// The lines as `tracing_subscriber` asks for them.
pub(super) struct ToLines<W>(pub(super) Arc<Lines<W>>);

impl<'a, W: Write + Send + 'static> MakeWriter<'a> for ToLines<W> {
    type Writer = Line<'a, W>;

    fn make_writer(&'a self) -> Line<'a, W> {
        Line { lines: &self.0, at_once: true }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line<'a, W> {
        Line { lines: &self.0, at_once: *metadata.level() <= Level::WARN }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    /// What was written, and in how many pieces.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(String, usize)>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut sink = self.0.lock().unwrap();
            sink.0.push_str(std::str::from_utf8(bytes).unwrap());
            sink.1 += 1;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn text(&self) -> String {
            self.0.lock().unwrap().0.clone()
        }

        fn pieces(&self) -> usize {
            self.0.lock().unwrap().1
        }
    }

    /// Lines that no thread writes.
    fn without_thread(sink: &Sink) -> Arc<Lines<Sink>> {
        let out = Mutex::new(Out { to: sink.clone(), room: Vec::new() });
        Arc::new(Lines { gathered: Mutex::default(), some: Condvar::new(), out })
    }

    fn logging<T>(lines: &Arc<Lines<Sink>>, work: impl FnOnce() -> T) -> T {
        let lines = tracing_subscriber::fmt::layer().with_writer(ToLines(Arc::clone(lines))).with_ansi(false);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), work)
    }

    #[test]
    fn lines_are_written_together_in_their_order_and_none_is_lost_at_the_end() {
        let sink = Sink::default();
        let lines = without_thread(&sink);
        logging(&lines, || {
            for number in 0..100 {
                tracing::info!("line {number};");
            }
        });
        assert_eq!(sink.text(), "");
        lines.write_out();
        let numbers: Vec<_> = sink.text().lines().map(|line| line.rsplit_once("line ").unwrap().1.to_owned()).collect();
        assert_eq!(numbers, (0..100).map(|number| format!("{number};")).collect::<Vec<_>>());
        assert_eq!(sink.pieces(), 1);
        lines.write_out();
        assert_eq!(sink.text().lines().count(), 100, "and none is written twice");
    }

    #[test]
    fn a_warning_is_written_at_once_behind_what_came_before_it() {
        let sink = Sink::default();
        let lines = without_thread(&sink);
        logging(&lines, || {
            tracing::info!("before");
            tracing::warn!("a warning");
            assert!(sink.text().find("before") < sink.text().find("a warning"));
            assert!(sink.text().ends_with("a warning\n"));
            tracing::info!("after");
            assert!(!sink.text().contains("after"));
            tracing::error!("an error");
            assert!(sink.text().contains("after") && sink.text().ends_with("an error\n"));
        });
    }

    #[test]
    fn what_is_gathered_is_bounded() {
        let sink = Sink::default();
        let lines = without_thread(&sink);
        let line = "x".repeat(1_000);
        logging(&lines, || {
            for _ in 0..200 {
                tracing::info!("{line}");
                assert!(lock(&lines.gathered).len() < MOST_BYTES);
            }
        });
        assert!(sink.text().len() + lock(&lines.gathered).len() >= 200 * 1_000);
    }

    #[test]
    fn a_line_that_nothing_follows_is_written_soon() {
        let sink = Sink::default();
        let lines = Lines::start(sink.clone()).unwrap();
        for word in ["first", "second"] {
            logging(&lines, || tracing::info!("{word}"));
            let began = Instant::now();
            while !sink.text().contains(word) {
                assert!(began.elapsed() < Duration::from_secs(10), "{word}");
                std::thread::yield_now();
            }
        }
    }
}
