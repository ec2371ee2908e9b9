/// Error type and message without what differs from event to event, so that failures of one cause are found together:
/// quoted text becomes `"…"`, and a word with a digit in it `#`.
pub(crate) fn fingerprint(error_type: &str, message: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut quoted = false;
    for word in message.split_whitespace() {
        let opens = word.matches('"').count() % 2 == 1;
        if quoted {
            quoted = !opens;
            continue;
        }
        if word.contains('"') {
            quoted = opens;
            words.push("\"…\"".to_owned());
        } else if word.contains(|character: char| character.is_ascii_digit()) {
            words.push("#".to_owned());
        } else {
            words.push(word.to_owned());
        }
    }
    format!("{error_type}: {}", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_one_cause_are_alike() {
        let of = |message: &str| fingerprint("unknown_line", message);
        assert_eq!(
            of("order 10248 has no line for SKU-7"),
            of("order 99 has no line for SKU-12")
        );
        assert_eq!(
            of("order 10248 has no line for SKU-7"),
            "unknown_line: order # has no line for #"
        );
        assert_eq!(of(r#"carrier "a b c" is not known"#), of(r#"carrier "d" is not known"#));
        assert_ne!(of("order 1 is not known"), of("order 1 is cancelled"));
        assert_ne!(fingerprint("a", "x"), fingerprint("b", "x"));
        assert_eq!(of("an \"open quote"), "unknown_line: an \"…\"");
    }
}
