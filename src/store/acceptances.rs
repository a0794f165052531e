//! What APNs accepted for the devices of broadcasts, by blocks of their numbers.
//!
//! Promises: a mark says of one device that APNs accepted a push for its token in an environment, and when, as its row
//! does elsewhere: a million rows need not be written for a million acceptances. What a mark says is said of the token
//! and the environment that the row bears: whoever replaces one of them takes the mark away and moves the block's version
//! on, and a mark is made only in the version that was read before the row was. Where that has passed, the row itself
//! is written, by whoever finds the token in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Kind, StoreError,
    queue::{for_update, settle::ACCEPTED_WITHIN},
    sql::Failure,
    statement::{Conn, Done, Row, Statement, Value, corrupt},
};
use crate::domain::{
    clock::Timestamp,
    device::{Address, BlockVersion, Device, DeviceSeq, DeviceToken},
    topic::Environment,
};

/// The devices of one block.
const DEVICES: i64 = 256;

/// The bytes of a mark: 0, or the seconds since [`EPOCH`] doubled, and 1 more in the sandbox.
const MARK: usize = 4;

/// 2020-01-01T00:00:00Z. Marks last for 68 years from it.
const EPOCH: Timestamp = Timestamp::from_seconds(1_577_836_800);

/// Blocks are read before what they are about where so many of the devices share one.
const WORTH: usize = 8;

/// The most blocks of one read.
const PAGE: usize = 500;

/// The number of a device's block.
pub(super) const fn block_of(device: DeviceSeq) -> i64 {
    device.0.div_euclid(DEVICES)
}

/// Where its mark begins.
fn offset_of(device: DeviceSeq) -> usize {
    usize::try_from(device.0.rem_euclid(DEVICES)).unwrap_or(0) * MARK
}

fn mark(environment: Environment, at: Timestamp) -> [u8; MARK] {
    let seconds = u32::try_from(at.since(EPOCH).as_secs()).unwrap_or(u32::MAX).clamp(1, u32::MAX >> 1);
    (seconds << 1 | u32::from(environment == Environment::Sandbox)).to_be_bytes()
}

fn read_mark(mark: &[u8]) -> Option<(Environment, Timestamp)> {
    let mark = u32::from_be_bytes(mark.try_into().ok()?);
    let environment = if mark & 1 == 1 { Environment::Sandbox } else { Environment::Production };
    (mark != 0).then(|| (environment, EPOCH.plus(Duration::from_secs(u64::from(mark >> 1)))))
}

#[derive(Debug)]
struct Block {
    version: i64,
    marks: Vec<u8>,
}

impl Block {
    fn from_row(row: &Row) -> Result<(i64, Self), StoreError> {
        let number = row.int(0)?;
        let marks = row.bytes(2)?.to_vec();
        if marks.len() != MARK * usize::try_from(DEVICES).unwrap_or(0) {
            return Err(corrupt("acceptances", "marks", number, "not as many as a block has"));
        }
        Ok((number, Self { version: row.int(1)?, marks }))
    }

    fn empty() -> Self {
        Self { version: 0, marks: vec![0; MARK * usize::try_from(DEVICES).unwrap_or(0)] }
    }

    fn of(&self, device: DeviceSeq) -> Option<(Environment, Timestamp)> {
        let begin = offset_of(device);
        read_mark(self.marks.get(begin..begin + MARK)?)
    }

    fn set(&mut self, device: DeviceSeq, mark: [u8; MARK]) {
        let begin = offset_of(device);
        if let Some(place) = self.marks.get_mut(begin..begin + MARK) {
            place.copy_from_slice(&mark);
        }
    }
}

/// Blocks that were read before the rows of their devices.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    read: BTreeMap<i64, Block>,
    /// Those that are not there as well.
    looked_for: BTreeSet<i64>,
}

impl Blocks {
    /// All from that of a device to that of another, which is not far.
    pub(super) async fn between(conn: &mut Conn<'_>, first: DeviceSeq, last: DeviceSeq) -> Result<Self, Failure> {
        Self::look_for(conn, (block_of(first)..=block_of(last)).collect()).await
    }

    /// Those of devices that lie together; none, if they do not.
    pub(super) async fn of(conn: &mut Conn<'_>, devices: &[DeviceSeq]) -> Result<Self, Failure> {
        let looked_for: BTreeSet<i64> = devices.iter().map(|device| block_of(*device)).collect();
        if devices.len() < WORTH * looked_for.len() {
            return Ok(Self::default());
        }
        Self::look_for(conn, looked_for).await
    }

    async fn look_for(conn: &mut Conn<'_>, looked_for: BTreeSet<i64>) -> Result<Self, Failure> {
        let numbers: Vec<i64> = looked_for.iter().copied().collect();
        let mut read = BTreeMap::new();
        for piece in numbers.chunks(PAGE) {
            let mut statement =
                Statement::new("-- acceptances.read\nSELECT block, version, marks FROM acceptances WHERE block IN ");
            statement.list(piece.iter().copied());
            read.extend(blocks_from(&conn.fetch(statement).await?)?);
        }
        Ok(Self { read, looked_for })
    }

    /// Adds to what a device's row says, which was read after this.
    pub(super) fn tell(&self, address: &mut Address) {
        let number = block_of(address.seq);
        let block = self.read.get(&number);
        if self.looked_for.contains(&number) {
            address.block = Some(BlockVersion(block.map_or(0, |block| block.version)));
        }
        if let Some(said) = block.and_then(|block| block.of(address.seq)) {
            join(&mut address.environment, &mut address.last_accepted_at, said);
        }
    }
}

fn blocks_from<'r>(rows: impl IntoIterator<Item = &'r Row>) -> Result<BTreeMap<i64, Block>, Failure> {
    Ok(rows.into_iter().map(Block::from_row).collect::<Result<_, StoreError>>()?)
}

/// What a mark adds to a row: nothing, if the row knows of another environment.
fn join(
    environment: &mut Option<Environment>,
    accepted_at: &mut Option<Timestamp>,
    (marked, at): (Environment, Timestamp),
) {
    if environment.is_none_or(|known| known == marked) {
        *environment = Some(marked);
        *accepted_at = Some(accepted_at.map_or(at, |known| known.max(at)));
    }
}

/// Adds what marks say of devices whose rows were read before and say that nothing was accepted.
pub(super) async fn tell(conn: &mut Conn<'_>, addresses: impl Iterator<Item = &mut Address>) -> Result<(), Failure> {
    let mut asked: Vec<&mut Address> =
        addresses.filter(|address| address.last_accepted_at.is_none() && address.block.is_none()).collect();
    let marks = marks(conn, asked.iter().map(|address| address.seq).collect()).await?;
    for address in &mut asked {
        if let Some(said) = marks.get(&address.seq) {
            join(&mut address.environment, &mut address.last_accepted_at, *said);
        }
    }
    Ok(())
}

/// The same of whole devices, also of those whose rows know of no acceptance of the last day.
pub(super) async fn tell_devices(
    conn: &mut Conn<'_>,
    devices: impl Iterator<Item = (DeviceSeq, &mut Device)>,
    now: Timestamp,
) -> Result<(), Failure> {
    let old = |device: &Device| device.last_accepted_at.is_none_or(|at| now.since(at) >= ACCEPTED_WITHIN);
    let mut asked: Vec<(DeviceSeq, &mut Device)> = devices.filter(|(_, device)| old(device)).collect();
    let marks = marks(conn, asked.iter().map(|(seq, _)| *seq).collect()).await?;
    for (seq, device) in &mut asked {
        if let Some(said) = marks.get(seq) {
            join(&mut device.environment, &mut device.last_accepted_at, *said);
        }
    }
    Ok(())
}

/// Marks of single devices.
async fn marks(
    conn: &mut Conn<'_>,
    devices: Vec<DeviceSeq>,
) -> Result<BTreeMap<DeviceSeq, (Environment, Timestamp)>, Failure> {
    let mut marks = BTreeMap::new();
    for piece in devices.chunks(PAGE) {
        let mut statement = Statement::new(
            "-- acceptances.marks\nSELECT d.seq, SUBSTR(a.marks, (d.seq % 256) * 4 + 1, 4) FROM devices d \
             JOIN acceptances a ON a.block = ",
        );
        // Differs: how whole numbers are divided.
        statement.push(match conn.kind() {
            Kind::Sqlite => "d.seq / 256",
            Kind::Mysql => "d.seq DIV 256",
        });
        statement.push(" WHERE d.seq IN ").list(piece.iter().map(|device| device.0));
        for row in &conn.fetch(statement).await? {
            if let Some(said) = read_mark(row.bytes(1)?) {
                marks.insert(DeviceSeq(row.int(0)?), said);
            }
        }
    }
    Ok(marks)
}

/// SQL, a condition: of this device there is no mark.
pub(super) fn unless_marked(statement: &mut Statement, device: DeviceSeq) {
    statement.push("NOT EXISTS (SELECT 1 FROM acceptances a WHERE a.block = ").bind(block_of(device));
    statement.push(" AND SUBSTR(a.marks, ").bind(offset_of(device) as u64 + 1).push(", 4) <> X'00000000')");
}

/// An acceptance that is to be noted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Acceptance<'t> {
    pub(super) device: DeviceSeq,
    /// What was accepted.
    pub(super) token: &'t DeviceToken,
    pub(super) environment: Environment,
    /// Of its block, as it was read before the device's row.
    pub(super) version: BlockVersion,
}

/// Marks devices whose blocks are locked. Those whose block has moved on come back: their rows may bear another token by
/// now. To be called in a transaction that is repeated if it meets a duplicate key: somebody has just inserted a block.
pub(super) async fn note<'t>(
    conn: &mut Conn<'_>,
    acceptances: &[Acceptance<'t>],
    locked: Locked,
    now: Timestamp,
) -> Result<Vec<Acceptance<'t>>, Failure> {
    let mut passed = Vec::new();
    let mut blocks = locked.0;
    let mut changed = BTreeSet::new();
    for one in acceptances {
        let number = block_of(one.device);
        let block = blocks.entry(number).or_insert_with(|| (Block::empty(), Written::Never));
        if block.0.version == one.version.0 {
            block.0.set(one.device, mark(one.environment, now));
            changed.insert(number);
        } else {
            passed.push(*one);
        }
    }
    blocks.retain(|number, _| changed.contains(number));
    write(conn, blocks).await?;
    Ok(passed)
}

/// Takes the marks of devices away whose token or environment is replaced in this transaction. To be called where [`note`]
/// may be.
pub(super) async fn forget(conn: &mut Conn<'_>, devices: &[DeviceSeq]) -> Result<(), Failure> {
    let Locked(mut blocks) = lock(conn, devices.iter().copied()).await?;
    let mut moved_on = BTreeSet::new();
    for device in devices {
        let number = block_of(*device);
        let (block, _) = blocks.entry(number).or_insert_with(|| (Block::empty(), Written::Never));
        block.set(*device, [0; MARK]);
        block.version += i64::from(moved_on.insert(number));
    }
    write(conn, blocks).await
}

/// Deletes the blocks of devices that are gone, where no other device is left in them.
pub(super) async fn delete_empty(
    conn: &mut Conn<'_>,
    devices: impl Iterator<Item = DeviceSeq>,
) -> Result<u64, Failure> {
    let blocks: BTreeSet<i64> = devices.map(block_of).collect();
    let mut empty = Vec::new();
    for block in blocks {
        let mut statement = Statement::new("-- acceptances.inhabited\nSELECT 1 FROM devices WHERE seq BETWEEN ");
        statement.bind(block * DEVICES).push(" AND ").bind((block + 1) * DEVICES - 1).push(" LIMIT 1");
        if conn.fetch(statement).await?.is_empty() {
            empty.push(block);
        }
    }
    let mut statement = Statement::new("-- acceptances.delete\nDELETE FROM acceptances WHERE block IN ");
    statement.list(empty);
    Ok(conn.execute(statement).await?)
}

/// Whether a block has a row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    Before,
    Never,
}

/// Blocks that are locked, by number; whichever has no row is missing.
pub(super) struct Locked(BTreeMap<i64, (Block, Written)>);

impl Locked {
    /// From what came of [`locking`].
    pub(super) fn from_done(done: &[Done]) -> Result<Self, Failure> {
        let read = blocks_from(done.iter().flat_map(|done| &done.rows))?;
        Ok(Self(read.into_iter().map(|(number, block)| (number, (block, Written::Before))).collect()))
    }
}

/// What reads the blocks of devices and locks them, in their order.
pub(super) fn locking(kind: Kind, devices: impl Iterator<Item = DeviceSeq>) -> Vec<Statement> {
    let numbers: BTreeSet<i64> = devices.map(block_of).collect();
    let numbers: Vec<i64> = numbers.into_iter().collect();
    let lock = |piece: &[i64]| {
        let mut statement =
            Statement::new("-- acceptances.lock\nSELECT block, version, marks FROM acceptances WHERE block IN ");
        statement.list(piece.iter().copied()).push(for_update(kind));
        statement
    };
    numbers.chunks(PAGE).map(lock).collect()
}

/// Does so.
pub(super) async fn lock(conn: &mut Conn<'_>, devices: impl Iterator<Item = DeviceSeq>) -> Result<Locked, Failure> {
    Locked::from_done(&conn.all(locking(conn.kind(), devices)).await?)
}

/// Writes blocks; those that have a row are locked.
async fn write(conn: &mut Conn<'_>, blocks: BTreeMap<i64, (Block, Written)>) -> Result<(), Failure> {
    const INSERT: &str = "-- acceptances.write\nINSERT INTO acceptances (block, version, marks)";
    let (mut new, mut known): (Vec<Vec<Value>>, Vec<Vec<Value>>) = (Vec::new(), Vec::new());
    for (number, (block, written)) in blocks {
        let row = vec![number.into(), block.version.into(), block.marks.into()];
        if written == Written::Never { new.push(row) } else { known.push(row) }
    }
    // Differs: how a row that is there is brought up to date.
    let tail = match conn.kind() {
        Kind::Sqlite => " ON CONFLICT (block) DO UPDATE SET version = excluded.version, marks = excluded.marks",
        Kind::Mysql => " ON DUPLICATE KEY UPDATE version = VALUES(version), marks = VALUES(marks)",
    };
    let mut statements = Statement::inserts(INSERT, known, tail);
    statements.extend(Statement::inserts(INSERT, new, ""));
    conn.all(statements).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_where_and_when_to_the_second() {
        let at = Timestamp::from_seconds(1_795_000_000);
        for environment in [Environment::Production, Environment::Sandbox] {
            assert_eq!(read_mark(&mark(environment, at)), Some((environment, at)));
            assert!(read_mark(&mark(environment, Timestamp::from_seconds(0))).is_some(), "a clock that is wrong");
        }
        assert_eq!(read_mark(&[0; MARK]), None);
    }

    #[test]
    fn a_row_that_knows_of_another_environment_is_right() {
        let (early, late) = (Timestamp::from_seconds(1_795_000_000), Timestamp::from_seconds(1_795_000_600));
        let joined = |environment, accepted_at| {
            let (mut environment, mut accepted_at) = (environment, accepted_at);
            join(&mut environment, &mut accepted_at, (Environment::Production, early));
            (environment, accepted_at)
        };
        let (production, sandbox) = (Some(Environment::Production), Some(Environment::Sandbox));
        assert_eq!(joined(None, None), (production, Some(early)));
        assert_eq!(joined(production, None), (production, Some(early)));
        assert_eq!(joined(production, Some(late)), (production, Some(late)));
        assert_eq!(joined(sandbox, Some(late)), (sandbox, Some(late)));
        assert_eq!(joined(sandbox, None), (sandbox, None));
    }
}
