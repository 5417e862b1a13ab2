//! Wrong programs do not compile, and the compiler's words say what is wrong.

#[test]
fn wrong_programs_get_readable_errors() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
