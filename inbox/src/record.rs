use rdkafka::message::OwnedHeaders;
use shared_events::headers::Header;
use tokio::time::Instant;

/// Room for the headers that logistics writes, with a trace.
const USUAL_HEADER_BYTES: usize = 384;

/// Counted for headers that cannot be read, whose size nobody tells: two such records fill a partition's queue.
const UNREADABLE_HEADER_BYTES: usize = 256 * 1024;

/// A record taken off the consumer's own buffers. Key, value and headers lie in one piece of memory: it is made on the poll
/// thread and let go in a worker, and as some twenty pieces it cost a tenth of the engine's processor time.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) offset: i64,
    /// Milliseconds since 1970, by the broker or the producer, as the topic is configured.
    pub(crate) timestamp_ms: Option<i64>,
    /// Set instead of the headers if a header's name is not UTF-8; they can be passed on but not read.
    pub(crate) unreadable_headers: Option<OwnedHeaders>,
    /// When it may be tried: now, or after what is left of its tier's delay.
    pub(crate) due: Instant,
    /// The key, the value, then each header as [`write_header`] does.
    bytes: Box<[u8]>,
    key_len: Option<usize>,
    value_len: Option<usize>,
}

impl Record {
    /// Due at once.
    pub(crate) fn new<'a>(
        offset: i64,
        timestamp_ms: Option<i64>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    ) -> Self {
        let (key_len, value_len) = (key.map(<[u8]>::len), value.map(<[u8]>::len));
        let (key, value) = (key.unwrap_or_default(), value.unwrap_or_default());
        let mut bytes = Vec::with_capacity(key.len() + value.len() + USUAL_HEADER_BYTES);
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        for (name, value) in headers {
            write_header(&mut bytes, name, value);
        }
        Self {
            offset,
            timestamp_ms,
            unreadable_headers: None,
            due: Instant::now(),
            bytes: bytes.into(),
            key_len,
            value_len,
        }
    }

    pub(crate) fn key(&self) -> Option<&[u8]> {
        self.key_len.map(|len| &self.bytes[..len])
    }

    pub(crate) fn value(&self) -> Option<&[u8]> {
        let start = self.key_len.unwrap_or_default();
        self.value_len.map(|len| &self.bytes[start..start + len])
    }

    /// In their order; a name may occur more than once.
    pub(crate) fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        // Each name was text when it was written.
        self.raw_headers()
            .map(|(name, value)| (std::str::from_utf8(name).unwrap_or_default(), value))
    }

    fn raw_headers(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let start = self.key_len.unwrap_or_default() + self.value_len.unwrap_or_default();
        let mut rest = &self.bytes[start..];
        std::iter::from_fn(move || {
            let (name, value);
            (name, value, rest) = read_header(rest)?;
            Some((name, value))
        })
    }

    /// The last header of a name: later ones win, as in HTTP clients that append.
    pub(crate) fn header(&self, name: &str) -> Option<&[u8]> {
        let named = self
            .raw_headers()
            .filter(|(candidate, _)| *candidate == name.as_bytes());
        named.last().map(|(_, value)| value)
    }

    pub(crate) fn header_list(&self) -> Vec<Header> {
        self.headers()
            .map(|(name, value)| (name.to_owned(), value.to_vec()))
            .collect()
    }

    /// The same record with other headers.
    pub(crate) fn with_headers(&self, headers: &[Header]) -> Self {
        let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        Self {
            unreadable_headers: self.unreadable_headers.clone(),
            due: self.due,
            ..Self::new(self.offset, self.timestamp_ms, self.key(), self.value(), headers)
        }
    }

    /// Bytes of memory that it takes.
    pub(crate) fn size(&self) -> usize {
        let unreadable = self.unreadable_headers.as_ref().map_or(0, |_| UNREADABLE_HEADER_BYTES);
        self.bytes.len() + unreadable + size_of::<Self>()
    }
}

/// The lengths of name and value, four bytes each, then both.
fn write_header(bytes: &mut Vec<u8>, name: &str, value: &[u8]) {
    // No record is larger than what the broker takes, which is far less than 4 GiB.
    for len in [name.len(), value.len()] {
        bytes.extend_from_slice(&(len as u32).to_ne_bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(value);
}

/// Name, value, and what comes after them; `None` at the end.
fn read_header(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (name_len, rest) = bytes.split_first_chunk()?;
    let (value_len, rest) = rest.split_first_chunk()?;
    let (name, rest) = rest.split_at_checked(u32::from_ne_bytes(*name_len) as usize)?;
    let (value, rest) = rest.split_at_checked(u32::from_ne_bytes(*value_len) as usize)?;
    Some((name, value, rest))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn a_record_gives_back_what_it_was_made_of(
            key in option::of(vec(any::<u8>(), 0..40)),
            value in option::of(vec(any::<u8>(), 0..600)),
            headers in vec((".{0,12}", vec(any::<u8>(), 0..80)), 0..12),
        ) {
            let pairs = headers.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
            let record = Record::new(7, Some(1), key.as_deref(), value.as_deref(), pairs);
            prop_assert_eq!(record.key(), key.as_deref());
            prop_assert_eq!(record.value(), value.as_deref());
            prop_assert_eq!(record.header_list(), headers.clone());
            let fewer = record.with_headers(&headers[..headers.len() / 2]);
            prop_assert_eq!((fewer.key(), fewer.value()), (key.as_deref(), value.as_deref()));
            prop_assert_eq!(fewer.header_list(), &headers[..headers.len() / 2]);
        }
    }

    #[test]
    fn of_two_headers_with_one_name_the_later_counts() {
        let headers = [("a", &b"1"[..]), ("b", b"2"), ("a", b"3")];
        let record = Record::new(7, None, None, None, headers);
        assert_eq!(record.header("a"), Some(&b"3"[..]));
        assert_eq!(record.header("c"), None);
    }
}
