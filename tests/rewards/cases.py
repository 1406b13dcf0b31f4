"""What each verifier reads: (response, reference answer, reward). docs/verifiers.md is made from these cases:
`python -m tests.rewards.cases`."""

CASES: dict[str, list[tuple[str, str, float]]] = {
    "choice": [
        ("Answer: B", "B", 1.0),
        ("The answer is (C).", "C", 1.0),
        (r"\boxed{(B)}", "B", 1.0),
        (r"\boxed{\text{(B)}}", "B", 1.0),
        (r"\boxed{\textbf{B}}", "B", 1.0),
        (r"\boxed{\mathrm{B}}", "B", 1.0),
        ("**Answer:** B", "B", 1.0),
        ("**Answer: (D)**", "D", 1.0),
        ("Answer: **B**", "B", 1.0),
        ("Answer: $B$", "B", 1.0),
        (r"Answer is: \(B\)", "B", 1.0),
        ("ANSWER: B", "B", 1.0),
        ("Answer: b", "B", 1.0),
        ("Answer\n\nB", "B", 1.0),
        ("Answer: B. Paris", "B", 1.0),
        ("Answer: B) Paris", "B", 1.0),
        ("Answer: B, because A is wrong", "B", 1.0),
        ("The correct answer is option B", "B", 1.0),
        (r"\boxed{A}, no: \boxed{B}", "B", 1.0),
        ("Answer: B\nI am confident in my answer.", "B", 1.0),
        ("Answer: I", "I", 1.0),
        ("The correct option is B.", "B", 1.0),
        ("The answer should be B", "B", 1.0),
        ("The answer to this question is B.", "B", 1.0),
        (r"\boxed{\text{Option B}}", "B", 1.0),
        (r"\boxed{\,B}", "B", 1.0),
        ('Answer: "B"', "B", 1.0),
        ("<answer>B</answer>", "B", 1.0),
        ("Answer: B<|im_end|>", "B", 1.0),
        ("#### B", "B", 1.0),
        ("Answer: B. Answer A is wrong.", "B", 1.0),
        ("Answer: B", "(B)", 1.0),
        ("Answer: B", "B.", 1.0),
        ("Answer: I think it is C", "I", 0.0),
        ("The answer: A good question", "A", 0.0),
        ("Answer: A, B, C, D", "A", 0.0),
        ("Answer: A or B", "A", 0.0),
        (r"\boxed{A and B}", "A", 0.0),
        (r"\boxed{AB}", "A", 0.0),
        ("Answer: A\nAnswer: A, B", "A", 0.0),
        ("The answer is not B", "B", 0.0),
        ("Answer: A-D", "A", 0.0),
        ("Answer: A\nB\nC\nD", "A", 0.0),
        ("Answer: (A) Paris (B) London", "A", 0.0),
        ("Answer: A (or B)", "A", 0.0),
        (r"\boxed{A(3)}", "A", 0.0),
        (r"\boxed{(A)(B)}", "A", 0.0),
        ("The answer is A-level", "A", 0.0),
        ("The answer is a (possibly empty) set", "A", 0.0),
        ("The answer is F-16", "F", 0.0),
        ("", "B", 0.0),
    ],
    "exact_line": [
        ("a6+7=3\nA:3\n", "3", 1.0),
        ("A: 3", "3", 1.0),
        ("A:3\n\n", "3", 1.0),
        ("A:4\n", "3", 0.0),
        ("A:3\nand more\n", "3", 0.0),
        ("a6+7=3\n", "3", 0.0),
        ("A:33", "3", 0.0),
        ("", "3", 0.0),
    ],
    "math": [
        (r"So the result is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"\boxed{4}. Wait, that is wrong. The answer is \boxed{5}.", "5", 1.0),
        (r"\boxed{4} then \boxed{5}", "5", 1.0),
        (r"\boxed{4} then \boxed{5}", "4", 0.0),
        (r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}", 0.0),
        (r"\boxed{\frac{1}{2^{99}}}", r"\frac{1}{2^{99}}", 1.0),
        (r"\boxed{10^{-20}}", r"10^{-21}", 0.0),
        (r"\boxed{1.5e-20}", "1.5e-21", 0.0),
        (r"\boxed{2^{100}+1}", "1267650600228229401496703205376", 0.0),
        (r"\boxed{0.33333}", "1/3", 0.0),
        (r"\boxed{0.333333}", "1/3", 1.0),
        (r"\fbox{5}", "5", 1.0),
        (r"\boxed {5}", "5", 1.0),
        (r"\boxed{1\,234}", "1234", 1.0),
        (r"\boxed{1{,}234}", "1234", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
        (r"\boxed{5.}", "5", 1.0),
        (r"\boxed{5}", "5.", 1.0),
        (r"\boxed{1 1/2}", "3/2", 1.0),
        (r"\boxed{1\frac{1}{2}}", "3/2", 1.0),
        (r"\boxed{90°}", "90", 1.0),
        (r"\boxed{90^{\circ}}", "90", 1.0),
        (r"\boxed{0.\overline{3}}", "1/3", 1.0),
        (r"\boxed{0.1\overline{6}}", "1/6", 1.0),
        (r"\boxed{1.5e3}", "1500", 1.0),
        (r"\boxed{1.5 \times 10^3}", "1500", 1.0),
        (r"\boxed{50\%}", "50", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{x=5}", "5", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{1,2}", "2,1", 1.0),
        (r"Hence \boxed{(3, 4)}", "(3,4)", 1.0),
        (r"\boxed{(1,2]}", "(1,2]", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"\boxed{x^2+1}", "1+x^2", 1.0),
        (r"\boxed{\text{yes}}", "yes", 1.0),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
        (r"\boxed{2\ 3/4}", "11/4", 1.0),
        (r"\boxed{1\ 2}", "12", 0.0),
        ("1 000 000", "1000000", 1.0),
        (r"\boxed{0.\dot{3}}", "1/3", 1.0),
        (r"The answer is $\pi$.", r"\pi", 1.0),
        ("The answer is x^2.", "x^2", 1.0),
        ("<answer>5</answer>", "5", 1.0),
        ("The answer is 5.", "5", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("1 1/2", "1.5", 1.0),
        ("1.5e3", "1500", 1.0),
        (r"We get $x = 7$, that is \boxed{7}.", "8", 0.0),
        (r"\boxed{5}. So the answer is 7", "7", 0.0),
        (r"\boxed{-5}", "5", 0.0),
        (r"\boxed{5", "6", 0.0),
        ("no idea", "8", 0.0),
        ("", "8", 0.0),
    ],
}

HEADER = """# What each verifier reads

Made from the cases of `tests/rewards/cases.py` by `python -m tests.rewards.cases`, so that each line is tested.
Verifiers of your own: see README, "Your own model and data".
"""

ABOUT = {
    "choice": "The last letter from A to J that the response boxes, or names after the word `answer`. References are "
    "letters, decorated or not; anything else is refused where the data is read.",
    "exact_line": "The response's last line is `A:` and the reference, spaces aside.",
    "math": "The last `\\boxed{}` or `\\fbox{}`, without one the last expression, compared by math-verify. Exact "
    "numbers must be equal; a decimal may differ by a millionth of its size.",
}


def page() -> str:
    """docs/verifiers.md."""
    parts = [HEADER]
    for name, cases in CASES.items():
        rows = [f"| {_code(response)} | {_code(answer)} | {reward:g} |" for response, answer, reward in cases]
        parts.append(
            f"## {name}\n{ABOUT[name]}\n\n| response | reference | reward |\n|---|---|---|\n" + "\n".join(rows)
        )
    return "\n".join(parts)


def _code(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("|", "\\|")
    return f"`{shown}`" if shown else "(empty)"


if __name__ == "__main__":
    print(page(), end="")
