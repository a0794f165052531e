//! Tags, or an app without some, as numbers of devices: ranges of indexes, merged in their order.
//!
//! Promises: what is chosen is what the tags say, each number once and in order; nothing is sorted, and a piece reads a
//! bounded number of rows, however many devices there are and however rare a match is.

use std::collections::VecDeque;

use super::{
    Kind,
    sql::Failure,
    statement::{Conn, Statement},
};
use crate::domain::{
    device::{DeviceSeq, Tag},
    notification::Audience,
    topic::Topic,
};

/// The most rows of one read.
pub(super) const PAGE: usize = 2_000;

/// The fewest, where many tags share the room.
const SMALL_PAGE: usize = 100;

/// After so many reads, and two for every range, a piece ends with what it has.
const READS: usize = 32;

/// What a piece has come to.
pub(super) struct Chosen {
    pub(super) devices: Vec<DeviceSeq>,
    /// All numbers up to this one were looked at.
    pub(super) reached: i64,
}

/// The first of those above `after`, not above `up_to`, that the audience means: at most `most`. Whether they are
/// active and what they are for is not looked at, and of which app only where no tag is asked for.
pub(super) async fn choose(
    conn: &mut Conn<'_>,
    topic: &Topic,
    audience: &Audience,
    (after, up_to): (i64, i64),
    most: usize,
) -> Result<Chosen, Failure> {
    let mut merge = Merge::of(topic, audience, (after, up_to), most);
    let most_reads = READS + 2 * merge.ranges();
    let mut devices = Vec::new();
    let mut next = after + 1;
    // Each turn goes on by at least one number, so that a piece that ends early has still got somewhere.
    while next <= up_to && devices.len() < most && merge.reads < most_reads {
        match merge.meet(conn, next).await? {
            Meeting::Nowhere => next = up_to + 1,
            Meeting::NotBefore(number) => next = number,
            Meeting::At(number) => {
                if !merge.is_excluded(conn, number).await? {
                    devices.push(DeviceSeq(number));
                }
                next = number + 1;
            }
        }
    }
    Ok(Chosen { devices, reached: next - 1 })
}

/// Ranges that a device must be in, each alone or any of several, and those that it must not be in.
struct Merge<'a> {
    wanted: Vec<Vec<Range<'a>>>,
    excluded: Vec<Range<'a>>,
    page: usize,
    reads: usize,
}

/// Where all that is wanted meets.
enum Meeting {
    At(i64),
    NotBefore(i64),
    Nowhere,
}

impl<'a> Merge<'a> {
    fn of(topic: &'a Topic, audience: &'a Audience, window: (i64, i64), most: usize) -> Self {
        let (all, any, none): (&[Tag], &[Tag], &[Tag]) = match audience {
            Audience::Tags { all, any, none } => (all, any, none),
            _ => (&[], &[], &[]),
        };
        let tagged = |tag| Range::new(Source::Tag(tag), window);
        let mut wanted: Vec<Vec<Range<'a>>> = all.iter().map(|tag| vec![tagged(tag)]).collect();
        if !any.is_empty() {
            wanted.push(any.iter().map(tagged).collect());
        }
        if wanted.is_empty() {
            wanted.push(vec![Range::new(Source::App(topic), window)]);
        }
        let mut merge = Self { wanted, excluded: none.iter().map(tagged).collect(), page: 0, reads: 0 };
        merge.page = (2 * most / merge.ranges()).clamp(SMALL_PAGE, PAGE);
        merge
    }

    fn ranges(&self) -> usize {
        self.wanted.iter().map(Vec::len).sum::<usize>() + self.excluded.len()
    }

    async fn meet(&mut self, conn: &mut Conn<'_>, from: i64) -> Result<Meeting, Failure> {
        let mut meeting = None;
        for any in &mut self.wanted {
            let mut first = None;
            for range in any {
                let number = range.first(conn, meeting.unwrap_or(from), self.page, &mut self.reads).await?;
                first = [first, number].into_iter().flatten().min();
            }
            match (first, meeting) {
                (None, _) => return Ok(Meeting::Nowhere),
                (Some(first), Some(others)) if first > others => return Ok(Meeting::NotBefore(first)),
                (Some(_), Some(_)) => {}
                (Some(first), None) => meeting = Some(first),
            }
        }
        Ok(meeting.map_or(Meeting::Nowhere, Meeting::At))
    }

    async fn is_excluded(&mut self, conn: &mut Conn<'_>, number: i64) -> Result<bool, Failure> {
        for range in &mut self.excluded {
            if range.first(conn, number, self.page, &mut self.reads).await? == Some(number) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whose numbers.
enum Source<'a> {
    App(&'a Topic),
    Tag(&'a Tag),
}

/// Ascending numbers of one index, read page by page.
struct Range<'a> {
    source: Source<'a>,
    read: VecDeque<i64>,
    /// All up to this one were read.
    read_to: i64,
    up_to: i64,
}

impl<'a> Range<'a> {
    fn new(source: Source<'a>, (after, up_to): (i64, i64)) -> Self {
        Self { source, read: VecDeque::new(), read_to: after, up_to }
    }

    /// The first number that is at least `from`, which never goes back; `None` if there is none.
    async fn first(
        &mut self,
        conn: &mut Conn<'_>,
        from: i64,
        page: usize,
        reads: &mut usize,
    ) -> Result<Option<i64>, Failure> {
        loop {
            while let Some(number) = self.read.front() {
                if *number >= from {
                    return Ok(Some(*number));
                }
                self.read.pop_front();
            }
            let after = self.read_to.max(from - 1);
            if after >= self.up_to {
                return Ok(None);
            }
            *reads += 1;
            let rows = conn.fetch(self.statement(conn.kind(), after, page)).await?;
            self.read_to = self.up_to;
            for row in &rows {
                self.read.push_back(row.int(0)?);
            }
            if rows.len() == page
                && let Some(last) = self.read.back()
            {
                self.read_to = *last;
            }
        }
    }

    fn statement(&self, kind: Kind, after: i64, page: usize) -> Statement {
        // Differs: how an index is named.
        let index = match (kind, &self.source) {
            (_, Source::App(_)) => devices_of_an_app(kind),
            (Kind::Sqlite, Source::Tag(_)) => " FROM device_tags INDEXED BY device_tags_tag WHERE tag = ",
            (Kind::Mysql, Source::Tag(_)) => " FROM device_tags FORCE INDEX (device_tags_tag) WHERE tag = ",
        };
        let mut statement = Statement::new("-- queue.range\nSELECT ");
        let number = match &self.source {
            Source::App(topic) => {
                statement.push("seq").push(index).bind(topic.as_str());
                "seq"
            }
            Source::Tag(tag) => {
                statement.push("device_seq").push(index).bind(tag.as_str().as_bytes());
                "device_seq"
            }
        };
        statement.push(" AND ").push(number).push(" > ").bind(after);
        statement.push(" AND ").push(number).push(" <= ").bind(self.up_to);
        statement.push(" ORDER BY ").push(number).push(" LIMIT ").bind(page as u64);
        statement
    }
}

/// An app's devices in the order of their numbers: the topic is to be bound. Without the name of the index an optimizer
/// may prefer the order of the table.
pub(super) const fn devices_of_an_app(kind: Kind) -> &'static str {
    // Differs: how an index is named.
    match kind {
        Kind::Sqlite => " FROM devices INDEXED BY devices_topic WHERE topic = ",
        Kind::Mysql => " FROM devices FORCE INDEX (devices_topic) WHERE topic = ",
    }
}

/// All devices in the order of their numbers, without what an optimizer may think of instead: what is said of them is to
/// follow.
pub(super) const fn devices_by_number(kind: Kind) -> &'static str {
    // Differs: how the order of the table is named.
    match kind {
        Kind::Sqlite => " FROM devices NOT INDEXED WHERE ",
        Kind::Mysql => " FROM devices FORCE INDEX (PRIMARY) WHERE ",
    }
}
