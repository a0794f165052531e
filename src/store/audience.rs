//! From an audience to devices, generations captured: a list, or a part of one, in one read; tags and everyone in
//! pieces, in the order of the devices' numbers.
//!
//! Promises: whoever is resolved is in exactly one place of exactly one chunk; whoever is named and not a target is
//! counted as unmatched; a named device that may not be sent to any more is a target that has ended, with the word for
//! why. A phone that passes on while tags are read is never a target for its next user by the tags of the one before.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    BoxError, Kind, StoreError, acceptances,
    acceptances::Blocks,
    ranges::{self, Chosen},
    rows::{accepted_at, learned},
    sql::Failure,
    statement::{Conn, Row, Statement, Value, corrupt, id_value},
};
use crate::domain::{
    clock::{Clock, Timestamp},
    delivery::{CHUNK_TARGETS, Chunk, DeliveryStatus, PART_TARGETS, State, Target},
    device::{Address, Addresses, DeviceId, DeviceSeq, DeviceStatus, DeviceToken, Generation, Tag, UserId},
    notification::{Audience, Notification, NotificationId},
    outcome::{Cause, own},
    topic::{Environment, Topic},
};

/// How many values go into one `IN (…)`.
pub(super) const LIST: usize = 500;

/// The words with which a target may end without having been leased.
pub(super) const WORDS: [Cause; 7] = [
    own::WRONG_PUSH_TYPE,
    own::OWNER_CHANGED,
    own::LOGGED_OUT,
    own::DEVICE_INACTIVE,
    own::DEVICE_SUSPENDED,
    own::CANCELLED,
    own::EXPIRED,
];

/// An audience whose time has not come, as it is kept.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kept {
    Users(Vec<UserId>),
    Devices { ids: Vec<DeviceId>, user_id: Option<UserId> },
    Tokens(Vec<String>),
    Tags { all: Vec<Tag>, any: Vec<Tag>, none: Vec<Tag> },
    Everyone,
}

/// An audience as bytes.
pub(super) fn encode(audience: &Audience) -> Result<Vec<u8>, StoreError> {
    let kept = match audience.clone() {
        Audience::Users(users) => Kept::Users(users),
        Audience::Devices { ids, user_id } => Kept::Devices { ids, user_id },
        Audience::Tokens(tokens) => Kept::Tokens(tokens.iter().map(|token| token.as_hex().to_owned()).collect()),
        Audience::Tags { all, any, none } => Kept::Tags { all, any, none },
        Audience::Everyone => Kept::Everyone,
    };
    serde_json::to_vec(&kept).map_err(|error| StoreError::Statement(error.into()))
}

/// Reads [`encode`] back.
pub(super) fn decode(bytes: &[u8]) -> Result<Audience, BoxError> {
    Ok(match serde_json::from_slice(bytes)? {
        Kept::Users(users) => Audience::Users(users),
        Kept::Devices { ids, user_id } => Audience::Devices { ids, user_id },
        Kept::Tokens(tokens) => Audience::Tokens(tokens.iter().map(|token| token.parse()).collect::<Result<_, _>>()?),
        Kept::Tags { all, any, none } => Audience::Tags { all, any, none },
        Kept::Everyone => Audience::Everyone,
    })
}

/// The part of a list from one place to another. Tags and everyone have no places.
pub(super) fn part(audience: &Audience, places: std::ops::Range<usize>) -> Audience {
    fn cut<T: Clone>(list: &[T], places: std::ops::Range<usize>) -> Vec<T> {
        list.get(places).unwrap_or_default().to_vec()
    }
    match audience {
        Audience::Users(users) => Audience::Users(cut(users, places)),
        Audience::Devices { ids, user_id } => Audience::Devices { ids: cut(ids, places), user_id: user_id.clone() },
        Audience::Tokens(tokens) => Audience::Tokens(cut(tokens, places)),
        Audience::Tags { .. } | Audience::Everyone => audience.clone(),
    }
}

/// A list that is to be resolved, or a part of one.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'w> {
    pub(super) notification: &'w Notification,
    pub(super) audience: &'w Audience,
    /// The place of its first in the caller's list.
    pub(super) from: usize,
}

/// One audience, resolved.
pub(super) struct Resolved {
    /// Each once, and where it stands already.
    pub(super) targets: Vec<(Target, State)>,
    /// How many were named and are nobody.
    pub(super) unmatched: u64,
}

/// Some audiences, resolved in one read.
pub(super) struct Resolution {
    /// In the order in which they were wanted.
    pub(super) resolved: Vec<Resolved>,
    /// The addresses that were read on the way.
    pub(super) addresses: Addresses,
    /// When the read began, on the clock's monotonic scale.
    pub(super) read_at: Duration,
}

/// A device as it was found.
struct Found {
    address: Address,
    topic: Box<[u8]>,
    push_type: Box<[u8]>,
}

const COLUMNS: &str = "seq, id, token, user_id, generation, environment, status, last_accepted_at";

/// Resolves lists: one read a kind for all of them.
pub(super) async fn resolve(
    conn: &mut Conn<'_>,
    clock: &dyn Clock,
    wanted: &[Wanted<'_>],
    now: Timestamp,
) -> Result<Resolution, Failure> {
    let read_at = clock.monotonic();
    let mut users = BTreeSet::new();
    let mut user_topics = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let mut tokens: BTreeMap<&Topic, BTreeSet<&DeviceToken>> = BTreeMap::new();
    for Wanted { notification, audience, .. } in wanted {
        match audience {
            Audience::Users(named) => {
                users.extend(named.iter());
                user_topics.insert(&notification.topic);
            }
            Audience::Devices { ids: named, .. } => ids.extend(named.iter()),
            Audience::Tokens(named) => tokens.entry(&notification.topic).or_default().extend(named.iter()),
            Audience::Tags { .. } | Audience::Everyone => {
                return Err(StoreError::Statement("tags and everyone are not resolved as lists".into()).into());
            }
        }
    }
    let mut by_user = find_by_user(conn, &users, &user_topics).await?;
    let mut by_id = find_by_id(conn, &ids).await?;
    let mut by_token = find_by_token(conn, &tokens).await?;
    let found = by_user.values_mut().flatten();
    let found = found.chain(by_id.values_mut()).chain(by_token.values_mut().flat_map(HashMap::values_mut));
    acceptances::tell(conn, found.map(|found| &mut found.address)).await?;
    let resolved = wanted
        .iter()
        .map(|Wanted { notification, audience, from }| {
            let (targets, unmatched) = match audience {
                Audience::Users(named) => pick_users(notification, named, &by_user),
                Audience::Devices { ids, user_id } => pick_devices(notification, ids, user_id.as_ref(), &by_id, now),
                Audience::Tokens(named) => pick_tokens(notification, named, *from, &by_token, now),
                Audience::Tags { .. } | Audience::Everyone => (Vec::new(), 0),
            };
            Resolved { targets, unmatched }
        })
        .collect();
    let addresses = by_user
        .into_values()
        .flatten()
        .chain(by_id.into_values())
        .chain(by_token.into_values().flat_map(HashMap::into_values))
        .map(|found| found.address)
        .collect();
    Ok(Resolution { resolved, addresses, read_at })
}

async fn find_by_user(
    conn: &mut Conn<'_>,
    users: &BTreeSet<&UserId>,
    topics: &BTreeSet<&Topic>,
) -> Result<HashMap<UserId, Vec<Found>>, Failure> {
    let mut found: HashMap<UserId, Vec<Found>> = HashMap::new();
    let users: Vec<_> = users.iter().copied().collect();
    for piece in users.chunks(LIST) {
        let mut statement = Statement::new("-- queue.resolve_users\nSELECT ");
        statement.push(COLUMNS).push(", topic, push_type FROM devices WHERE user_id IN ");
        statement.list(piece.iter().map(|user| user.as_str().as_bytes()));
        statement.push(" AND topic IN ").list(topics.iter().map(|topic| topic.as_str()));
        statement.push(" AND status = 'active'");
        for row in &conn.fetch(statement).await? {
            let one = found_from(row)?;
            if let Some(user) = &one.address.user_id {
                found.entry(user.clone()).or_default().push(one);
            }
        }
    }
    // In the order in which chunks hold them; the database would sort all of them at once.
    for devices in found.values_mut() {
        devices.sort_unstable_by_key(|one| one.address.seq);
    }
    Ok(found)
}

async fn find_by_id(conn: &mut Conn<'_>, ids: &BTreeSet<&DeviceId>) -> Result<HashMap<DeviceId, Found>, Failure> {
    let mut found = HashMap::with_capacity(ids.len());
    let ids: Vec<_> = ids.iter().copied().collect();
    for piece in ids.chunks(LIST) {
        let mut statement = Statement::new("-- queue.resolve_devices\nSELECT ");
        statement.push(COLUMNS).push(", topic, push_type FROM devices WHERE id IN ");
        statement.list(piece.iter().map(|id| id_value(id.as_uuid())));
        for row in &conn.fetch(statement).await? {
            let one = found_from(row)?;
            found.insert(one.address.id, one);
        }
    }
    Ok(found)
}

async fn find_by_token(
    conn: &mut Conn<'_>,
    tokens: &BTreeMap<&Topic, BTreeSet<&DeviceToken>>,
) -> Result<HashMap<Topic, HashMap<DeviceToken, Found>>, Failure> {
    let mut found: HashMap<Topic, HashMap<DeviceToken, Found>> = HashMap::new();
    for (topic, tokens) in tokens {
        let tokens: Vec<_> = tokens.iter().copied().collect();
        let of_topic = found.entry((*topic).clone()).or_default();
        for piece in tokens.chunks(LIST) {
            let mut statement = Statement::new("-- queue.resolve_tokens\nSELECT ");
            statement.push(COLUMNS).push(", topic, push_type FROM devices WHERE topic = ").bind(topic.as_str());
            statement.push(" AND token IN ").list(piece.iter().map(|token| token.to_bytes()));
            for row in &conn.fetch(statement).await? {
                let one = found_from(row)?;
                of_topic.insert(one.address.token.clone(), one);
            }
        }
    }
    Ok(found)
}

fn fits(notification: &Notification, found: &Found) -> bool {
    notification.push_type.token_type().as_str().as_bytes() == &*found.push_type
}

fn of_topic(notification: &Notification, found: &Found) -> bool {
    notification.topic.as_str().as_bytes() == &*found.topic
}

fn pick_users(
    notification: &Notification,
    named: &[UserId],
    found: &HashMap<UserId, Vec<Found>>,
) -> (Vec<(Target, State)>, u64) {
    let mut targets = Vec::new();
    let mut unmatched = 0;
    let mut seen = HashSet::with_capacity(named.len());
    for user in named {
        if !seen.insert(user) {
            continue;
        }
        let before = targets.len();
        let devices = found.get(user).map_or(&[][..], Vec::as_slice);
        targets.extend(devices.iter().filter(|one| of_topic(notification, one) && fits(notification, one)).map(
            |one| {
                let target = Target::Device { seq: one.address.seq, generation: Some(one.address.generation) };
                (target, State::PENDING)
            },
        ));
        if targets.len() == before {
            unmatched += 1;
        }
    }
    (targets, unmatched)
}

fn pick_devices(
    notification: &Notification,
    named: &[DeviceId],
    fence: Option<&UserId>,
    found: &HashMap<DeviceId, Found>,
    now: Timestamp,
) -> (Vec<(Target, State)>, u64) {
    let mut targets = Vec::new();
    let mut unmatched = 0;
    let mut seen = HashSet::with_capacity(named.len());
    for id in named {
        if !seen.insert(id) {
            continue;
        }
        match found.get(id).filter(|one| of_topic(notification, one)) {
            Some(one) => targets.push(target(notification, one, fence, now)),
            None => unmatched += 1,
        }
    }
    (targets, unmatched)
}

fn pick_tokens(
    notification: &Notification,
    named: &[DeviceToken],
    from: usize,
    found: &HashMap<Topic, HashMap<DeviceToken, Found>>,
    now: Timestamp,
) -> (Vec<(Target, State)>, u64) {
    let mut targets = Vec::new();
    let mut seen = HashSet::with_capacity(named.len());
    let registered = found.get(&notification.topic);
    for (index, token) in (from..).zip(named) {
        if !seen.insert(token) {
            continue;
        }
        targets.push(if let Some(one) = registered.and_then(|of_topic| of_topic.get(token)) {
            target(notification, one, None, now)
        } else {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            (Target::Token { index, token: token.clone() }, State::PENDING)
        });
    }
    (targets, 0)
}

/// A device that was named: what it is for and who holds it decide first, then whether it is sent to.
fn target(notification: &Notification, one: &Found, fence: Option<&UserId>, now: Timestamp) -> (Target, State) {
    let Address { seq, generation, user_id, status, .. } = &one.address;
    let target = Target::Device { seq: *seq, generation: fence.is_some().then_some(*generation) };
    let end = |status, word| State::ended(status, word, now);
    let state = match (fence, user_id, status) {
        _ if !fits(notification, one) => end(DeliveryStatus::Failed, own::WRONG_PUSH_TYPE),
        (Some(_), None, _) => end(DeliveryStatus::Suppressed, own::LOGGED_OUT),
        (Some(fence), Some(holder), _) if fence != holder => end(DeliveryStatus::Suppressed, own::OWNER_CHANGED),
        (_, _, DeviceStatus::Inactive) => end(DeliveryStatus::Unregistered, own::DEVICE_INACTIVE),
        (_, _, DeviceStatus::Suspended) => end(DeliveryStatus::Failed, own::DEVICE_SUSPENDED),
        (_, _, DeviceStatus::Active) => State::PENDING,
    };
    (target, state)
}

/// One chunk, if these are `all` of an audience and fit into it; else parts of it, which end where a block of devices does
/// once they are half full: most blocks are then noted by one settle alone.
pub(super) fn into_chunks(targets: Vec<(Target, State)>, all: bool) -> Vec<Chunk> {
    if all && targets.len() <= CHUNK_TARGETS {
        let (targets, states): (Vec<Target>, Vec<State>) = targets.into_iter().unzip();
        return if targets.is_empty() { Vec::new() } else { vec![Chunk { targets, states }] };
    }
    let block = |target: &Target| match target {
        Target::Device { seq, .. } => Some(acceptances::block_of(*seq)),
        Target::Token { .. } => None,
    };
    let mut chunks = Vec::with_capacity(targets.len().div_ceil(PART_TARGETS));
    let mut part = Chunk::default();
    for (target, state) in targets {
        let ends = part.targets.last().is_some_and(|last| block(last) != block(&target));
        if part.targets.len() >= if ends { PART_TARGETS / 2 } else { PART_TARGETS } {
            chunks.push(std::mem::take(&mut part));
        }
        part.targets.push(target);
        part.states.push(state);
    }
    if !part.targets.is_empty() {
        chunks.push(part);
    }
    chunks
}

/// A piece of tags or of everyone.
pub(super) struct Piece {
    /// In the order of their numbers.
    pub(super) targets: Vec<(Target, State)>,
    /// Their addresses, which were read on the way.
    pub(super) addresses: Vec<Arc<Address>>,
    /// All numbers up to this one were looked at.
    pub(super) reached: i64,
}

impl Piece {
    /// Enters a device, if it may be sent to.
    fn take(&mut self, address: Address, generation: Option<Generation>) {
        if address.status == DeviceStatus::Active {
            self.targets.push((Target::Device { seq: address.seq, generation }, State::PENDING));
            self.addresses.push(Arc::new(address));
        }
    }
}

/// The next piece of tags or of everyone: at most `most` of the active devices for this push type with numbers above
/// `after`. May hold fewer, or none, though there are more: until `up_to` is reached.
pub(super) async fn next_piece(
    conn: &mut Conn<'_>,
    notification: &Notification,
    audience: &Audience,
    (after, up_to): (i64, i64),
    most: usize,
) -> Result<Piece, Failure> {
    if *audience == Audience::Everyone {
        return next_of_all(conn, notification, (after, up_to), most).await;
    }
    let topic = &notification.topic;
    let Chosen { mut devices, reached } = ranges::choose(conn, topic, audience, (after, up_to), most).await?;
    let mut found = find_by_seq(conn, &devices).await?;
    // Once more, behind the read of the generations: had the phone passed on between tags and generation, its next
    // user would get what the tags of the one before asked for.
    let again = ranges::choose(conn, topic, audience, (after, reached), most).await?;
    let still: HashSet<DeviceSeq> = again.devices.into_iter().collect();
    devices.retain(|device| still.contains(device));
    let room = devices.len();
    let mut piece =
        Piece { targets: Vec::with_capacity(room), addresses: Vec::with_capacity(room), reached: again.reached };
    for one in devices.iter().filter_map(|device| found.remove(device)) {
        if of_topic(notification, &one) && fits(notification, &one) {
            let generation = Some(one.address.generation);
            piece.take(one.address, generation);
        }
    }
    Ok(piece)
}

/// So many numbers are looked at in one read of the table.
const WINDOW: i64 = 2_000;

/// The table is read as long as one of so many numbers is a device that is asked for: another app's costs a server a fifth of
/// what finding one by the app's index does, a number that nobody has nothing.
const SPARSE: i64 = 4;

/// [`next_piece`] of everyone: all that is needed of a device in one read.
///
/// By the table itself as long as enough of the numbers in the way are this app's devices, which costs a server a third of
/// finding each by the app's index; by that index where they are few.
async fn next_of_all(
    conn: &mut Conn<'_>,
    notification: &Notification,
    (after, up_to): (i64, i64),
    most: usize,
) -> Result<Piece, Failure> {
    let mut piece = Piece { targets: Vec::with_capacity(most), addresses: Vec::with_capacity(most), reached: after };
    let (mut left, mut by_table) = (i64::try_from(most).unwrap_or(i64::MAX), true);
    while piece.reached < up_to && left > 0 {
        let (mut found, reached, met) = if by_table {
            let to = up_to.min(piece.reached + left.min(WINDOW));
            let found = in_window(conn, notification, (piece.reached, to)).await?;
            let numbers = to - piece.reached;
            let many = i64::try_from(found.len()).unwrap_or(i64::MAX);
            by_table = SPARSE * many >= numbers;
            // Others that were met before the index is turned to do not make the piece smaller.
            (found, to, if by_table { numbers } else { many })
        } else {
            let page = usize::try_from(left).map_or(ranges::PAGE, |left| left.min(ranges::PAGE));
            in_index(conn, notification, (piece.reached, up_to), page).await?
        };
        acceptances::tell(conn, found.iter_mut()).await?;
        left -= met;
        piece.reached = reached;
        for address in found {
            piece.take(address, None);
        }
    }
    Ok(piece)
}

/// What is read of everyone's devices, as [`address_from`] takes it. Who holds the phone is nobody's business here.
const UNHELD: &str = "seq, id, token, NULL, generation, environment, status, last_accepted_at";

/// The same as one text for all. From SQLite each row crosses threads, which costs several times what reading it does;
/// MariaDB takes longer to put the text together than it takes to send and read rows.
const UNHELD_AS_TEXT: &str = "GROUP_CONCAT(HEX(id) || seq || ',' || generation || ',' || COALESCE(environment, '') || ',' || \
                              last_accepted_at || ',' || HEX(token) || ';', '')";

/// The devices of everyone in a window of numbers, by the table itself.
async fn in_window(
    conn: &mut Conn<'_>,
    notification: &Notification,
    (after, to): (i64, i64),
) -> Result<Vec<Address>, Failure> {
    let blocks = Blocks::between(conn, DeviceSeq(after + 1), DeviceSeq(to)).await?;
    let mut statement = Statement::new("-- queue.resolve_everyone\nSELECT ");
    // Differs: what a row costs.
    statement.push(match conn.kind() {
        Kind::Sqlite => UNHELD_AS_TEXT,
        Kind::Mysql => UNHELD,
    });
    statement.push(ranges::devices_by_number(conn.kind())).push("seq > ").bind(after).push(" AND seq <= ").bind(to);
    statement.push(" AND topic = ").bind(notification.topic.as_str()).push(" AND status = 'active' AND push_type = ");
    statement.bind(notification.push_type.token_type().as_str());
    let rows = conn.fetch(statement).await?;
    let mut found = match conn.kind() {
        Kind::Sqlite => {
            let text = rows.first().map(|row| row.bytes_or_null(0)).transpose()?.flatten().unwrap_or_default();
            addresses_from(text)
                .map_err(|error| corrupt("devices", "seq", format_args!("{} to {to}", after + 1), error))?
        }
        Kind::Mysql => rows.iter().map(address_from).collect::<Result<Vec<_>, _>>()?,
    };
    // As the table was read, but nobody promises that.
    if !found.is_sorted_by_key(|address| address.seq) {
        found.sort_unstable_by_key(|address| address.seq);
    }
    for address in &mut found {
        blocks.tell(address);
    }
    Ok(found)
}

/// Active devices from [`UNHELD_AS_TEXT`].
fn addresses_from(text: &[u8]) -> Result<Vec<Address>, BoxError> {
    /// Hex digits of an id.
    const ID: usize = 32;
    let mut rest = std::str::from_utf8(text)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (device, others) = rest.split_once(';').ok_or("it breaks off")?;
        let (id, device) = device.split_at_checked(ID).ok_or("no id")?;
        let mut values = device.split(',');
        let mut next = || values.next().ok_or("a value is missing");
        found.push(Address {
            id: DeviceId::from_uuid(uuid::Uuid::try_parse(id)?),
            seq: DeviceSeq(next()?.parse()?),
            generation: Generation(next()?.parse()?),
            environment: parsed_or_null(learned(Some(next()?).filter(|word| !word.is_empty())).map(str::as_bytes))?,
            last_accepted_at: accepted_at(next()?.parse()?),
            token: next()?.parse()?,
            user_id: None,
            status: DeviceStatus::Active,
            block: None,
        });
        rest = others;
    }
    Ok(found)
}

/// Everyone's devices by the app's index, up to which number all were looked at, and how many rows were met: at most `page`.
async fn in_index(
    conn: &mut Conn<'_>,
    notification: &Notification,
    (after, up_to): (i64, i64),
    page: usize,
) -> Result<(Vec<Address>, i64, i64), Failure> {
    let mut statement = Statement::new("-- queue.resolve_everyone\nSELECT ");
    statement
        .push(UNHELD)
        .push(", push_type = ")
        .bind(notification.push_type.token_type().as_str())
        .push(ranges::devices_of_an_app(conn.kind()));
    statement.bind(notification.topic.as_str()).push(" AND seq > ").bind(after).push(" AND seq <= ").bind(up_to);
    statement.push(" ORDER BY seq LIMIT ").bind(page as u64);
    let rows = conn.fetch(statement).await?;
    let reached = match rows.last() {
        Some(last) if rows.len() == page => last.int(0)?,
        _ => up_to,
    };
    let mut found = Vec::with_capacity(rows.len());
    for row in &rows {
        if row.int(8)? != 0 {
            found.push(address_from(row)?);
        }
    }
    Ok((found, reached, i64::try_from(rows.len()).unwrap_or(i64::MAX)))
}

/// The highest number that any device has: those that are there now have no higher one.
pub(super) async fn highest(conn: &mut Conn<'_>) -> Result<i64, Failure> {
    let rows = conn.fetch(Statement::new("-- queue.highest_device\nSELECT MAX(seq) FROM devices")).await?;
    Ok(rows.first().map(|row| row.int_or_null(0)).transpose()?.flatten().unwrap_or(0))
}

/// Devices by number, in whose order they come.
async fn find_by_seq(conn: &mut Conn<'_>, devices: &[DeviceSeq]) -> Result<HashMap<DeviceSeq, Found>, Failure> {
    let mut found = HashMap::with_capacity(devices.len());
    let blocks = Blocks::of(conn, devices).await?;
    for piece in devices.chunks(LIST) {
        let mut statement = Statement::new("-- queue.resolve_numbers\nSELECT ");
        statement.push(COLUMNS).push(", topic, push_type FROM devices WHERE ");
        numbered(&mut statement, piece);
        for row in &conn.fetch(statement).await? {
            // Others that stand between them are not looked at.
            if piece.binary_search(&DeviceSeq(row.int(0)?)).is_ok() {
                let mut one = found_from(row)?;
                blocks.tell(&mut one.address);
                found.insert(one.address.seq, one);
            }
        }
    }
    acceptances::tell(conn, found.values_mut().map(|found| &mut found.address)).await?;
    Ok(found)
}

/// Addresses by number: the ownership read. Those that are forgotten are missing.
pub(super) async fn read_addresses(conn: &mut Conn<'_>, devices: &[DeviceSeq]) -> Result<Vec<Address>, Failure> {
    let mut devices = devices.to_vec();
    devices.sort_unstable();
    devices.dedup();
    let blocks = Blocks::of(conn, &devices).await?;
    let mut addresses = Vec::with_capacity(devices.len());
    for piece in devices.chunks(LIST) {
        let mut statement = Statement::new("-- queue.addresses\nSELECT ");
        statement.push(COLUMNS).push(" FROM devices WHERE ");
        numbered(&mut statement, piece);
        for row in &conn.fetch(statement).await? {
            // Others that stand between them are not looked at.
            if piece.binary_search(&DeviceSeq(row.int(0)?)).is_ok() {
                let mut address = address_from(row)?;
                blocks.tell(&mut address);
                addresses.push(address);
            }
        }
    }
    acceptances::tell(conn, addresses.iter_mut()).await?;
    Ok(addresses)
}

/// Finds at least these numbers, which are in order; true if it may find others. Where they are close together it reads all
/// from the first to the last: that walks through the table once, and a list looks each up.
pub(super) fn numbered(statement: &mut Statement, devices: &[DeviceSeq]) -> bool {
    if let (Some(first), Some(last)) = (devices.first(), devices.last())
        && last.0 - first.0 < 2 * i64::try_from(devices.len()).unwrap_or(0)
    {
        statement.push("seq BETWEEN ").bind(first.0).push(" AND ").bind(last.0);
        return true;
    }
    statement.push("seq IN ").list(devices.iter().map(|seq| seq.0));
    false
}

fn found_from(row: &Row) -> Result<Found, StoreError> {
    Ok(Found { address: address_from(row)?, topic: row.bytes(8)?.into(), push_type: row.bytes(9)?.into() })
}

fn address_from(row: &Row) -> Result<Address, StoreError> {
    let seq = row.int(0)?;
    let bad = |column| move |error: BoxError| corrupt("devices", column, seq, error);
    let environment = row.bytes_or_null(5)?.map(std::str::from_utf8).transpose();
    let environment = environment.map_err(|error| bad("environment")(error.into()))?;
    Ok(Address {
        seq: DeviceSeq(seq),
        id: DeviceId::from_uuid(uuid::Uuid::from_slice(row.bytes(1)?).map_err(|error| bad("id")(error.into()))?),
        token: DeviceToken::from_bytes(row.bytes(2)?).map_err(|error| bad("token")(error.into()))?,
        user_id: parsed_or_null(row.bytes_or_null(3)?).map_err(bad("user_id"))?,
        generation: Generation(row.int(4)?),
        environment: parsed_or_null::<Environment>(learned(environment).map(str::as_bytes))
            .map_err(bad("environment"))?,
        status: parsed(row.bytes(6)?).map_err(bad("status"))?,
        last_accepted_at: accepted_at(row.int(7)?),
        block: None,
    })
}

/// A value from the text that was kept of it.
pub(super) fn parsed<T>(bytes: &[u8]) -> Result<T, BoxError>
where
    T: FromStr,
    T::Err: std::fmt::Debug,
{
    let text = std::str::from_utf8(bytes)?;
    text.parse().map_err(|error| format!("{error:?}").into())
}

/// A value from the text that was kept of it, or `NULL`.
pub(super) fn parsed_or_null<T>(bytes: Option<&[u8]>) -> Result<Option<T>, BoxError>
where
    T: FromStr,
    T::Err: std::fmt::Debug,
{
    bytes.map(parsed).transpose()
}

/// Who is addressed by name.
pub(super) fn users(audience: &Audience) -> BTreeSet<&UserId> {
    match audience {
        Audience::Users(users) => users.iter().collect(),
        Audience::Devices { user_id, .. } => user_id.iter().collect(),
        Audience::Tokens(_) | Audience::Tags { .. } | Audience::Everyone => BTreeSet::new(),
    }
}

/// The row that links a user to a notification.
pub(super) fn link(user: &UserId, id: NotificationId) -> Vec<Value> {
    vec![user.as_str().as_bytes().into(), id_value(id.as_uuid())]
}

/// The link rows of a notification.
pub(super) fn links(id: NotificationId, audience: &Audience) -> Vec<Vec<Value>> {
    users(audience).into_iter().map(|user| link(user, id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_come_as_one_text_are_read_with_all_that_is_needed_of_them_and_half_a_text_is_refused() {
        let id = "00112233445566778899AABBCCDDEEFF";
        let text =
            format!("{id}7,3,sandbox,1795000000000,ABCDEF;{id}900,1,unverified,-1099511627776,00;{id}901,2,,0,ff;");
        let read = addresses_from(text.as_bytes()).unwrap();
        let seen: Vec<_> = read
            .iter()
            .map(|a| (a.seq.0, a.generation.0, a.environment, a.last_accepted_at, a.token.as_hex()))
            .collect();
        let at = Timestamp::from_millis(1_795_000_000_000);
        assert_eq!(
            seen,
            [
                (7, 3, Some(Environment::Sandbox), Some(at), "abcdef"),
                (900, 1, None, None, "00"),
                (901, 2, None, None, "ff"),
            ]
        );
        assert_eq!(read[0].id.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        for length in 1..text.find(';').unwrap() {
            assert!(addresses_from(&text.as_bytes()[..length]).is_err(), "{length} bytes");
        }
    }
}
