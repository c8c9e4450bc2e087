import gkd_dsl


@gkd_dsl.op("soft(student: Float[..., C] <- teacher: Float[..., C]) -> Loss[...]")
def soft(student, teacher):
    """Squared difference of the distributions."""
    return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
