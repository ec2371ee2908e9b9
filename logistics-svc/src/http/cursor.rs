//! The next page starts below this id. Opaque to clients, so that the order of the list may change with the version.

use sha2::{Digest, Sha256};

const VERSION: u8 = 1;
const CHECK_BYTES: usize = 4;

/// Hexadecimal of version, id and a checksum.
pub(super) fn encode(id: i64) -> String {
    let mut bytes = vec![VERSION];
    bytes.extend(id.to_be_bytes());
    bytes.extend(checksum(&bytes));
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `None` if the text was not made by [`encode`]: cut, altered or invented.
pub(super) fn decode(text: &str) -> Option<i64> {
    if !text.is_ascii() || text.len() != 2 * (1 + 8 + CHECK_BYTES) {
        return None;
    }
    let bytes: Vec<u8> = (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16))
        .collect::<Result<_, _>>()
        .ok()?;
    let (content, check) = bytes.split_at(1 + 8);
    if check != checksum(content) || content[0] != VERSION {
        return None;
    }
    content[1..].try_into().ok().map(i64::from_be_bytes)
}

fn checksum(content: &[u8]) -> [u8; CHECK_BYTES] {
    let hash = Sha256::digest(content);
    [hash[0], hash[1], hash[2], hash[3]]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{decode, encode};

    proptest! {
        #[test]
        fn a_cursor_survives_the_round_trip_and_no_alteration(id in 1_i64.., at in 0_usize..26, other in "[0-9a-f]") {
            let cursor = encode(id);
            prop_assert_eq!(decode(&cursor), Some(id));
            let mut altered = cursor.clone();
            altered.replace_range(at..=at, &other);
            prop_assert_eq!(decode(&altered).is_some(), altered == cursor);
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".*") {
            prop_assert_eq!(decode(&text), None);
        }
    }
}
