use std::process::Command;

/// Exit code and standard error.
fn refused(args: &[&str]) -> anyhow::Result<(Option<i32>, String)> {
    let run = Command::new(env!("CARGO_BIN_EXE_loadtest")).args(args).output()?;
    assert!(run.stdout.is_empty(), "{run:?}");
    Ok((run.status.code(), String::from_utf8(run.stderr)?))
}

#[test]
fn nonsense_is_refused_with_its_argument_before_anything_is_started() -> anyhow::Result<()> {
    for (args, named) in [
        (["drain", "--rows=0"].as_slice(), "--rows"),
        (&["drain", "--relay", "after-commit"], "--relay after-commit"),
        (&["drain", "--set", "RELAY_LINGERS=1ms"], "--set RELAY_LINGERS"),
        (&["drain", "--peer", "debezium"], "--debezium-libs"),
        (
            &["drain", "--peer", "debezium", "--debezium-libs", "/nowhere"],
            "--debezium-libs /nowhere",
        ),
        (&["latency", "--peer", "pg-recvlogical"], "--peer pg-recvlogical"),
        (&["latency", "--rate", "100000", "--duration", "1h"], "--rate"),
        (&["latency", "--duration=-5s"], "--duration"),
    ] {
        let (code, message) = refused(args)?;
        assert_eq!(code, Some(2), "{args:?}: {message}");
        assert!(message.contains(named), "{args:?}: {message}");
    }
    Ok(())
}

#[test]
fn servers_of_the_environment_are_asked_for_by_their_variables() -> anyhow::Result<()> {
    let run = Command::new(env!("CARGO_BIN_EXE_loadtest"))
        .args(["drain", "--servers", "environment"])
        .env_remove("TEST_DATABASE_URL")
        .output()?;
    let message = String::from_utf8(run.stderr)?;
    assert_eq!(run.status.code(), Some(2), "{message}");
    assert!(message.contains("TEST_DATABASE_URL"), "{message}");
    Ok(())
}
